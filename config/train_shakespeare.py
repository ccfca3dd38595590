# Characters of Shakespeare, from nothing, with whatever this machine has:
# $ python train.py config/train_shakespeare.py
# $ python sample.py --out_dir=out-shakespeare
# To train the small model although there is a GPU, --device=cpu goes before this file.
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
    # 0.6M parameters, about a minute and a half on two cores. What each choice gave is in the README (Measured).
    batch_size = 8
    block_size = 128         # 4 windows of 256 tokens take longer and learn less
    n_layer, n_head, n_embd = 3, 4, 128  # a fourth layer or more width learns less in the same time
    rope = qk_norm = relu2 = True
    if torch.cpu._is_avx512_bf16_supported():
        optimizer = 'muon'
        learning_rate = 4e-3
        weight_decay = 0.4   # much, for the text is short: 0.2 gave 1.635, 0.4 1.627, 0.8 1.636 (one seed)
    else:                    # Muon computes in bfloat16, which takes long on a CPU that has to emulate it
        learning_rate = 2e-3
    lr_schedule = 'linear'   # to zero, where the loss falls fastest at the end
    warmup_iters = 30
    max_iters = lr_decay_iters = 1400
    eval_interval = 500
    eval_iters = 20
    log_interval = 100
