# The loss of OpenAI's GPT-2 (774M parameters) on both splits of a dataset in its tokens:
# $ python train.py config/eval_gpt2_large.py --dataset=shakespeare
# On OpenWebText nanoGPT's author reports 2.66 (train) and 2.67 (val). Not run here yet.

init_from = 'gpt2-large'
dataset = 'openwebtext'  # python prepare.py --dataset=openwebtext
eval_only = True
batch_size = 8
eval_iters = 500         # 500 x 8 windows of 1,024 tokens, or all there are
