# GPT-2 (124M) from nothing on 8 GPUs:
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# The shape, the batch and the schedule are nanoGPT's, whose author reports a val loss of about 2.85 on OpenWebText
# after 4 days on 8 A100 40GB. Not run to the end with this code yet.

out_dir = 'out-gpt2'
dataset = 'openwebtext'  # python prepare.py --dataset=openwebtext, or --dataset=fineweb
wandb_run_name = 'gpt2-124M'

# 12 windows x 1,024 tokens x 40 micro-batches = 491,520 tokens a step, close to GPT-2's half a million. 1, 2, 4, 5, 8,
# 10, 20 or 40 processes share it: fewer GPUs give the same run, only slower.
batch_size = 12  # at least 9 GB of GPU memory, by python model.py --batch_size=12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens
max_iters = 600000
lr_decay_iters = 600000

# a look every few minutes
eval_interval = 1000
eval_iters = 200
log_interval = 10
