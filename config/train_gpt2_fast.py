# Train a modern model of GPT-2's size (124M) on 5 billion tokens of FineWeb.
# $ python prepare.py --dataset=fineweb --shards=51
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
#
# With AdamW, this learning rate, rotary positions and a linear decay to zero, others have
# published a val loss of 3.28, which llm.c's GPT-2 recipe reaches after 10 billion tokens.
# Not run to the end with this code yet; config/train_shakespeare.py has small experiments.

out_dir = 'out-gpt2-fast'
dataset = 'fineweb'
wandb_run_name = 'gpt2-124M-fast'

rope = qk_norm = relu2 = True
learning_rate = 1.8e-3         # three times GPT-2's; qk_norm keeps attention stable at this rate
beta1, beta2 = 0.9, 0.95
weight_decay = 0.1

# 32 sequences x 1,024 tokens x 16 micro-batches = 524,288 tokens a step, shared by 1, 2, 4, 8 or
# 16 processes
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16
max_iters = lr_decay_iters = 9536  # 5 billion tokens
warmup_iters = 250
lr_schedule = 'linear'         # to zero, over the last 60% of the steps
lr_hold_iters = int(0.4 * max_iters) - warmup_iters

eval_interval = 250
eval_iters = 320               # 10 million tokens
log_interval = 10
