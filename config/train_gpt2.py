# Train GPT-2 (124M) from scratch on 8 GPUs.
# $ python prepare.py --dataset=openwebtext
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# Model, batch size and schedule are nanoGPT's. Its author reports a val loss of about 2.85 on
# OpenWebText after 4 days on 8 A100 40GB.

out_dir = 'out-gpt2'
dataset = 'openwebtext'  # or fineweb
wandb_run_name = 'gpt2-124M'

# 12 sequences x 1,024 tokens x 40 micro-batches = 491,520 tokens a step, about as many as GPT-2's
# half a million. 1, 2, 4, 5, 8, 10, 20 or 40 processes can share the micro-batches: with fewer
# GPUs the run is the same, but slower. Larger micro-batches are faster. By estimate, a
# batch_size of 20 fits GPUs with 24 GB (24 micro-batches), and 60 those with 80 GB (8).
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens
max_iters = 600000

# evaluate every few minutes
eval_interval = 1000
eval_iters = 200
log_interval = 10
