# Train a character-level model of Shakespeare from scratch.
# $ python train.py config/train_shakespeare.py
# $ python sample.py --out_dir=out-shakespeare
#
# The machine decides the size of the model. To train the small one despite a GPU, put
# --device=cpu before this file.
import torch

out_dir = 'out-shakespeare'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
beta2 = 0.99  # average over more steps, because each has few tokens

if torch.cuda.is_available() and device != 'cpu':
    # The 10M-parameter model of nanoGPT's shakespeare_char. Its author reports a val loss of
    # 1.4697, on another 1.1 MB of Shakespeare, after 3 minutes on an A100.
    batch_size = 64
    block_size = 256
    n_layer, n_head, n_embd = 6, 6, 384
    dropout = 0.2            # about 84 epochs
    learning_rate = 1e-3
    min_lr = 1e-4
    warmup_iters = 100
    max_iters = 5000
    eval_interval = 250
    log_interval = 10
else:
    # A 0.6M-parameter model that trains in two and a half minutes on two cores. Mean val loss of
    # two seeds: 1.641; with 4 heads 1.647; with sequences of 64 tokens 1.671; with a learning rate
    # of 6e-3 1.651; with 1,600 steps 1.638.
    batch_size = 8
    block_size = 128         # 4 sequences of 256 tokens take longer and learn less
    n_layer, n_head, n_embd = 3, 2, 128  # a 4th layer or more width learns less in the same time
    rope = qk_norm = True
    activation = 'relu2'
    optimizer = 'muon'
    learning_rate = 4e-3
    weight_decay = 0.4       # high, because the text is short
    lr_schedule = 'linear'   # to zero: most of the progress comes at the end of the decay
    warmup_iters = 30
    max_iters = 1400
    eval_interval = 200
    eval_iters = 20
    log_interval = 100
