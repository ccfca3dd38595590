# Train a modern model of GPT-2's size (124M) with Muon on 1.7 billion tokens of FineWeb.
# $ python prepare.py --dataset=fineweb --shards=19
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
#
# The recipe is that of modded-nanogpt's simple track (records/track_3_optimization), which
# publishes a val loss of 3.28 after these 3,250 steps; llm.c's GPT-2 needs 10 billion tokens. It
# is carried over as far as the flags go. Left out: an untied head, learning rates of their own for
# embedding and head, zero-initialized projections, soft-capped logits, half-truncated rotations,
# RMSNorm. On an A100, torch 2.10 with compile gave nan in that recipe: use another torch there.
#
# Seen here, after 320 steps of a model with 2 layers on Shakespeare (mean val loss of two seeds,
# noise of 0.01): 1.875 with heads of 32 channels, 1.858 with 64; 1.865 as it is, 1.890 with
# zero-initialized projections, 1.880 with three times the learning rate for the embedding.

out_dir = 'out-gpt2-fast'
dataset = 'fineweb'
wandb_run_name = 'gpt2-124M-fast'

rope = qk_norm = True
activation = 'relu2'
n_head = 6                     # heads of 128 channels

# Published: Muon's learning rate of 0.025, times sqrt(rows / columns) where that exceeds 1. Muon's
# updates have AdamW's size here, which makes this 0.0045. Decay per step is the same.
optimizer = 'muon'
learning_rate = 4.5e-3
weight_decay = 0.28
beta1, beta2 = 0.95, 0.95

# 32 sequences x 1,024 tokens x 16 micro-batches = 524,288 tokens a step, shared by 1, 2, 4, 8 or
# 16 processes. Each computes Muon's whole step: 1.6 TFLOPs, 0.4% of the training step on one
# GPU and 3% on 8. By estimate, a batch_size of 16 fits GPUs with 24 GB (32 micro-batches), and
# 64 those with 80 GB (8).
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 16
max_iters = 3250
warmup_iters = 0
lr_schedule = 'linear'         # to zero, over the last 70% of the steps
lr_hold_iters = int(0.3 * max_iters)

eval_interval = 650            # each evaluation costs as much as 13 steps
eval_iters = 320               # 10 million tokens of each split
log_interval = 10
