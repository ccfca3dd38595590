# Evaluate OpenAI's GPT-2 on both splits of a dataset with its tokenizer.
# $ python train.py config/eval_gpt2.py --dataset=shakespeare
# $ python train.py config/eval_gpt2.py --init_from=gpt2-xl
#
# Losses that nanoGPT's author published for OpenWebText:
#
# --init_from     parameters   train    val
# gpt2                  124M    3.11   3.12
# gpt2-medium           350M    2.85   2.84
# gpt2-large            774M    2.66   2.67
# gpt2-xl              1558M    2.56   2.54

init_from = 'gpt2'
dataset = 'openwebtext'  # prepare it with: python prepare.py --dataset=openwebtext
eval_only = True
batch_size = 8
eval_iters = 500         # up to 500 batches of 8 x 1,024 tokens
