# Finetune OpenAI's GPT-2 to write like Shakespeare.
# $ python train.py config/finetune_shakespeare.py
# $ python sample.py --out_dir=out-shakespeare-gpt2 --start="ROMEO:"
#
# Batch size, learning rate and number of steps are nanoGPT's.

out_dir = 'out-shakespeare-gpt2'
dataset = 'shakespeare'  # the embedded text with GPT-2's tokenizer, prepared automatically
# Weights, gradients and AdamW take 2 GB of memory for gpt2, 25 GB for gpt2-xl; python model.py
# prints them for any size. The activations come on top.
init_from = 'gpt2'       # or 'gpt2-medium', 'gpt2-large', 'gpt2-xl'

# 32 sequences x 1,024 tokens a step, one at a time to save memory: about 9 steps an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20           # the model overfits soon after
learning_rate = 3e-5     # a twentieth of the rate for pretraining, to keep what GPT-2 has learned
decay_lr = False
dropout = 0.1

eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # save only when the val loss improves
