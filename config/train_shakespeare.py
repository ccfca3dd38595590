# Characters of Shakespeare, from nothing, with whatever this machine has:
# $ python train.py config/train_shakespeare.py
# $ python sample.py --out_dir=out-shakespeare
import torch

out_dir = 'out-shakespeare'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
beta2 = 0.99  # longer than for large batches: a step sees few tokens

if torch.cuda.is_available() and device != 'cpu':
    # The 10M-parameter model of nanoGPT's shakespeare_char, whose author reports val loss 1.4697 (on another 1.1 MB of
    # Shakespeare) after 3 minutes on an A100. Not measured on this text yet.
    batch_size = 64
    block_size = 256
    n_layer, n_head, n_embd = 6, 6, 384
    dropout = 0.2            # the text is read 84 times
    learning_rate = 1e-3
    min_lr = 1e-4
    warmup_iters = 100
    max_iters = lr_decay_iters = 5000
    eval_interval = 250
    log_interval = 10
else:
    # 0.8M parameters, about two minutes on two cores.
    batch_size = 4
    block_size = 128
    n_layer, n_head, n_embd = 4, 4, 128
    rope = qk_norm = relu2 = True
    learning_rate = 2e-3
    lr_schedule = 'linear'
    warmup_iters = 50
    max_iters = lr_decay_iters = 3000
    eval_interval = 500
    eval_iters = 50
    log_interval = 100
