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
    # 0.8M parameters, about two minutes on two cores: val loss 1.73 over the whole validation file in 118 s (median of
    # 3 runs; 2-core AVX-512 virtual machine, torch 2.13.0, 2026-11-21). The notes below give that loss after 1.84M
    # tokens, a fifth more than this run takes; one seed each, so a difference of 0.01 may be chance.
    batch_size = 4           # 1.700; 8 windows and half the steps: 1.726
    block_size = 128         # 8 windows of 64 (rope alone, lr 4e-3): 1.748; 4 windows of 128: 1.723
    n_layer, n_head, n_embd = 4, 4, 128  # 6 layers, or 192 wide, learn less in the same time
    rope = True              # alone (lr 3e-3): 1.734
    qk_norm = True           # with rope: 1.715
    relu2 = True             # with both: 1.700
    learning_rate = 2e-3     # 1.695; 3e-3: 1.700; 6e-3: 1.725
    lr_schedule = 'linear'   # to zero, where the loss falls fastest at the end
    warmup_iters = 50
    max_iters = lr_decay_iters = 3000
    eval_interval = 500
    eval_iters = 50
    log_interval = 100
