"""
Train a GPT.

$ python train.py config/train_shakespeare.py                # from scratch
$ python train.py config/train_shakespeare.py --init_from=resume
$ python train.py config/finetune_shakespeare.py --init_from=gpt2
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
$ torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 \\
      --nproc_per_node=8 train.py config/train_gpt2.py    # first of two nodes
"""
import datetime
import functools
import gc
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map

from configurator import UserError, check, configure, keep_memory, optional, resolve_device, resolve_dtype
from model import (
    GPT,
    PRETRAINED,
    beyond_gpt2,
    config_from_settings,
    find_pretrained,
    load_checkpoint,
    save_checkpoint,
)
from prepare import (
    ANSWER,
    DATA,
    DATASETS,
    DOCUMENT_START,
    SHAKESPEARE,
    get_tokenizer,
    load_dataset,
    lock_folder,
    prepare,
)

# input and output
out_dir = 'out'           # folder for ckpt.pt, best.pt and log.jsonl
init_from = 'scratch'     # 'scratch', 'resume' or 'auto' (resume if out_dir has a run), or a model: gpt2-xl
eval_interval = 2000      # steps between evaluations, which also save
eval_iters = 200          # maximum number of batches (of batch_size) in an evaluation
eval_only = False         # evaluate once and exit
log_interval = 1          # steps between log lines
sample_interval = 0       # steps between text samples, a multiple of eval_interval; 0: never
always_save_checkpoint = True  # False: evaluations save ckpt.pt only when the val loss improves
save_interval = 0.0       # minutes between saves, besides those of evaluations; 0: off
wandb_log = False         # log to Weights & Biases
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'   # folder in data/ that prepare.py wrote, or an absolute path
batch_size = 12           # sequences in a micro-batch of one process
block_size = 1024         # tokens in a sequence
gradient_accumulation_steps = 5 * 8  # micro-batches in a step, over all processes together
# model
n_layer = 12              # number of blocks
n_head = 12               # attention heads in each block
n_embd = 768              # width of the model
dropout = 0.0             # 0 for pretraining; 0.1 or more for finetuning and small datasets
bias = False              # biases in linear layers and LayerNorms
rope = False              # rotary positions instead of learned position embeddings
qk_norm = False           # normalize queries and keys
relu2 = False             # squared ReLU instead of GELU
# optimizer
optimizer = 'adamw'       # 'adamw', or 'muon' for the blocks' matrices and AdamW for the rest
learning_rate = 6e-4      # peak learning rate
max_iters = 600000        # number of training steps
weight_decay = 1e-1       # weight decay of matrices; biases and norms have none
beta1 = 0.9               # AdamW's decay rate of the mean gradient, Muon's momentum
beta2 = 0.95              # AdamW's decay rate of the mean squared gradient
grad_clip = 1.0           # maximum gradient norm; 0: off
max_skipped = 20          # stop after this many consecutive non-finite gradients
decay_lr = True           # False: constant learning rate, without warmup
lr_schedule = 'cosine'    # 'cosine' decays to min_lr, 'linear' to zero
warmup_iters = 2000       # steps of linear warmup
lr_hold_iters = 0         # steps at the peak learning rate between warmup and decay
lr_decay_iters = 600000   # step at which the decay ends, usually max_iters
min_lr = 6e-5             # final learning rate of 'cosine', usually learning_rate / 10
# system
seed = 1337               # random seed of initial weights, data order and dropout
device = 'auto'           # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best available
dtype = 'auto'            # 'float32', 'bfloat16', 'float16'; auto: the fastest on this device
compile = 'auto'          # torch.compile: True, False; auto: on CUDA, and in long runs on a CPU
parallel = 'ddp'          # under torchrun: 'ddp', or 'fsdp' to shard the model over the processes
activation_checkpointing = False  # recompute activations in the backward pass: less memory, slower
backend = 'nccl'          # torch.distributed backend for CUDA; CPUs use gloo
timeout = 30.0            # minutes to wait for another process before giving up

# dense bfloat16 peak (float16 on older cards) in TFLOPS, from the data sheets; the first match wins
PEAK_TFLOPS = {
    'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'A100': 312, 'L40S': 362, 'L4': 121,
    'A10': 125, 'V100': 125, 'T4': 65, 'RTX 4090': 165, 'RTX 3090': 71,
}


def peak_flops(device, dtype):
    """The device's peak FLOPs per second, or None where unknown."""
    if device.startswith('cuda') and dtype != 'float32':
        for name, tflops in PEAK_TFLOPS.items():
            if re.search(rf'\b{name}\b', torch.cuda.get_device_name(device)):
                return tflops * 1e12


@functools.lru_cache(maxsize=2)
def epoch_windows(n_starts, stride, seed, epoch):
    """The windows of an epoch: every stride-th of n_starts from a random offset, shuffled."""
    rng = np.random.default_rng((seed, epoch))
    count = max(1, n_starts // stride)
    offset = rng.integers(n_starts - (count - 1) * stride)
    return offset + stride * rng.permutation(count)


def shuffled_windows(n_starts, stride, seed, first, count):
    """Windows first, first + 1, ... of the endless sequence of epochs."""
    per_epoch = max(1, n_starts // stride)
    epochs, places = np.divmod(np.arange(first, first + count), per_epoch)
    return np.array([epoch_windows(n_starts, stride, seed, epoch)[place]
                     for epoch, place in zip(epochs.tolist(), places, strict=True)])


def document_windows(mask, block_size):
    """Windows over conversations: where they start, where the tokens that they count end, and how many
    these are. A window starts at the first document that the one before cuts off and does not count; a
    document longer than a window continues in the next. Windows without answers are left out."""
    documents = np.flatnonzero(mask == DOCUMENT_START)
    starts = [0]
    while (end := starts[-1] + block_size) < len(mask) - 1:  # end: the last token that it predicts
        document = documents[np.searchsorted(documents, end + 1, side='right') - 1]
        starts.append(document if document > starts[-1] else end)
    ends = starts[1:] + [len(mask) - 1]
    counts = [np.sum(mask[start + 1:end + 1] == ANSWER) for start, end in zip(starts, ends, strict=True)]
    windows = np.stack([starts, ends, counts])
    return windows[:, windows[2] > 0]


def load_windows(file, dtype, starts, block_size, device, mask=None, ends=None):
    """Inputs and targets, (len(starts), block_size): the windows, and the same shifted by one. With a
    mask, targets that are not answers or lie beyond ends are -1. The text wraps at its end."""
    data = np.memmap(file, dtype, 'r')  # mapped each time, or pages already read would count as used memory
    positions = starts[:, None] + np.arange(block_size + 1)
    ids = data[positions % len(data)].astype(np.int64)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if mask is not None:
        answers = mask[positions % len(data)] == ANSWER
        counted = answers & (positions <= ends[:, None])
        targets = np.where(counted[:, 1:], targets, -1)
    batch = torch.from_numpy(np.stack([inputs, targets]))
    if device.startswith('cuda'):
        batch = batch.pin_memory().to(device, non_blocking=True)  # copies while the GPU computes
    else:
        batch = batch.to(device)
    return batch[0], batch[1]


def get_lr(step, peak, warmup, hold, decay_end, min_lr, schedule):
    """Linear warmup, then constant for hold steps, then cosine or linear decay."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    decay_start = warmup + hold
    progress = (step - decay_start) / max(1, decay_end - decay_start)
    remaining = 1 - max(0, min(1, progress))  # from 1 down to 0
    if schedule == 'linear':
        return peak * remaining
    return min_lr + (peak - min_lr) * (1 - math.cos(math.pi * remaining)) / 2


def shard(model, device_type, dtype):
    """FSDP2: split weights, gradients and optimizer state over all processes. Each block's
    weights are gathered when it runs, in dtype on a GPU."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = dist.init_device_mesh(device_type, (dist.get_world_size(),))
    # LayerNorm on a CPU cannot mix two dtypes
    param_dtype = getattr(torch, dtype) if device_type == 'cuda' else None
    policy = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def gather(value):
    """The full tensor of a sharded one, on the CPU of rank 0. All ranks must call this."""
    if not isinstance(value, DTensor):
        return value
    value = value.full_tensor()
    return value.cpu() if dist.get_rank() == 0 else None


def shard_like(param, value):
    """Shard a tensor of the optimizer's state as its parameter is sharded."""
    if not isinstance(param, DTensor) or value.shape != param.shape:
        return value
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


def load_optimizer(optimizer, saved):
    """Load the saved state, but keep the current settings, such as the weight decay."""
    params = [p for group in optimizer.param_groups for p in group['params']]
    state = {}
    try:
        for i, entries in saved['state'].items():
            for name, value in entries.items():
                # fused kernels do not check these tensors: a wrong shape would corrupt memory
                if value.shape != (() if name == 'step' else params[i].shape):
                    raise ValueError(f'{name} of shape {tuple(value.shape)}')
            state[i] = {name: shard_like(params[i], value) for name, value in entries.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'the optimizer state does not fit the model ({error}): start a new run from its '
                        'weights with --init_from=FILE') from None
    optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))


def set_aside(out_dir):
    """Move the files of an earlier run into a new folder inside out_dir."""
    files = [name for name in ('ckpt.pt', 'best.pt', 'log.jsonl')
             if os.path.exists(os.path.join(out_dir, name))]
    if files in ([], ['log.jsonl']):
        return
    number = 1
    while os.path.exists(os.path.join(out_dir, f'earlier-{number}')):
        number += 1
    folder = os.path.join(out_dir, f'earlier-{number}')
    os.mkdir(folder)
    for name in files:
        os.rename(os.path.join(out_dir, name), os.path.join(folder, name))
    print(f'moved the earlier run in {out_dir} to {folder}')


def truncate_log(path, iter_num):
    """Drop the log entries of steps that will be repeated, and lines cut short by a crash."""
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            entries = [re.fullmatch(r'{"iter": (\d+), [^{]*}\n', line) for line in f]
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(entry[0] for entry in entries if entry and int(entry[1]) < iter_num)
        os.replace(path + '.tmp', path)


def exit_together(code):
    """Wait for all ranks, then exit. os._exit skips the interpreter's shutdown, which threads of gloo
    can crash."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(code)


if __name__ == '__main__':
    config = configure(globals())
    check(config, 'eval_interval > 0', 'eval_iters > 0', 'log_interval > 0', 'sample_interval >= 0',
          'save_interval >= 0', 'batch_size > 0', 'gradient_accumulation_steps > 0',
          "optimizer in ('adamw', 'muon')", 'learning_rate >= 0', 'max_iters >= 0',
          'weight_decay >= 0', 'beta1 >= 0', 'beta1 < 1', 'beta2 >= 0', 'beta2 < 1',
          'grad_clip >= 0', 'max_skipped > 0', "lr_schedule in ('cosine', 'linear')",
          'min_lr >= 0', 'seed >= 0', 'seed < 2**63', "compile in (True, False, 'auto')",
          "parallel in ('ddp', 'fsdp')", 'timeout > 0')
    keep_memory()

    # -- distributed: one process, or one of many that torchrun started -----------

    ddp = 'RANK' in os.environ
    rank = int(os.environ.get('RANK', 0))
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    fsdp = ddp and parallel == 'fsdp'
    device = resolve_device(device)
    device_type = device.partition(':')[0]
    devnull = open(os.devnull, 'w')
    sys.stdout = sys.stdout or devnull  # None if it is closed
    sys.stdout.reconfigure(errors='replace')  # for terminals that lack a character
    terminal = sys.stdout.isatty()

    def print0(line, transient=False):
        """Print on rank 0. In a terminal the next line overwrites a transient one."""
        if rank > 0:
            return
        end = '\n'
        if terminal and transient:
            line = line[:shutil.get_terminal_size().columns - 1]
            end = '\r'
        if terminal:
            line = '\x1b[K' + line  # clears the transient line
        for fallback in (sys.stderr, devnull):
            try:
                print(line, end=end, flush=True)
                return
            except OSError:  # a closed pipe or full disk must not stop the run
                sys.stdout = fallback

    if ddp:
        if device not in ('cpu', f"cuda:{os.environ['LOCAL_RANK']}"):
            raise UserError(f"device={config['device']!r} under torchrun must be 'cpu' or 'cuda'")
        restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0))
        if restarts and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            print0('warning: restarts may hang: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun')
        dist.init_process_group(f'cpu:gloo,cuda:{backend}' if device_type == 'cuda' else 'gloo',
                                timeout=datetime.timedelta(minutes=timeout))
    if gradient_accumulation_steps % world_size:
        multiple = math.ceil(gradient_accumulation_steps / world_size) * world_size
        raise UserError(f'gradient_accumulation_steps={gradient_accumulation_steps} is not a '
                        f'multiple of the {world_size} processes: use {multiple}')
    micro_steps = gradient_accumulation_steps // world_size

    # -- data ---------------------------------------------------------------------

    ckpt_path = os.path.join(out_dir, 'ckpt.pt')
    if rank == 0:  # prepares, downloads and decides; the others wait
        if not eval_only:
            run_lock = lock_folder(out_dir)
        embedded = DATASETS.get(dataset, {}).get('source') == SHAKESPEARE
        if embedded and not os.path.exists(os.path.join(DATA, dataset, 'train.bin')):
            prepare(dataset)
        if init_from in PRETRAINED:
            find_pretrained(init_from)
        if init_from == 'auto':
            init_from = 'resume' if os.path.exists(ckpt_path) else 'scratch'
    if ddp:
        message = [init_from]
        dist.broadcast_object_list(message)
        init_from = message[0]
    meta, paths = load_dataset(dataset)
    bins = {split: open(path, 'rb') for split, path in paths.items()}  # kept if prepare.py runs again
    is_chat = bool(meta.get('chat'))
    masks = dict(train=None, val=None)
    if is_chat:
        for split in masks:
            masks[split] = np.fromfile(os.path.join(DATA, dataset, f'{split}.mask'), np.uint8)

    # -- model --------------------------------------------------------------------

    torch.manual_seed(seed)
    resume = init_from == 'resume'
    if init_from == 'scratch':
        padded = math.ceil(meta['vocab_size'] / 64) * 64  # GPUs are faster with multiples of 64
        raw_model = GPT(config_from_settings(config, vocab_size=padded))
    else:
        path = ckpt_path if resume else init_from
        checkpoint = load_checkpoint(path, data=os.path.join(DATA, dataset))
        if checkpoint['tokenizer'] != meta['tokenizer']:
            raise UserError(
                f"{path} and dataset={dataset} have different tokenizers "
                f"({checkpoint['tokenizer']['type']}, {meta['tokenizer']['type']}): prepare the "
                f'dataset with --tokenizer={path}')
        raw_model = GPT.from_checkpoint(checkpoint, dropout=dropout)
        if not resume and block_size < raw_model.config.block_size:
            raw_model.crop_block_size(block_size)
        block_size = raw_model.config.block_size
        for name, value in vars(raw_model.config).items():  # the checkpoint decides the shape
            if config.get(name, value) != value:
                print0(f'{path} sets {name}={value!r}')
                config[name] = value
    raw_model.recompute_activations = activation_checkpointing
    for split, file in bins.items():
        if meta[f'{split}_tokens'] <= block_size and not is_chat:
            raise UserError(f"{file.name} has {meta[f'{split}_tokens']:,} tokens, too few for a "
                            f'block_size of {block_size}: use a longer text or a smaller block_size')

    dtype = resolve_dtype(dtype, device, width=raw_model.config.n_embd)
    if dtype == 'float16' and (optimizer == 'muon' or fsdp):
        raise UserError("dtype='float16' works only with optimizer='adamw' and parallel='ddp': "
                        'use those, or --dtype=float32')
    if device_type == 'mps' and activation_checkpointing and dropout:
        raise UserError('activation_checkpointing on mps would recompute with a different '
                        'dropout mask: use dropout=0')
    autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
    tokens_per_step = gradient_accumulation_steps * batch_size * block_size
    flops_per_step = raw_model.flops_per_token() * tokens_per_step

    if compile == 'auto':
        long_run = flops_per_step * max_iters / world_size > 1e14  # about ten minutes
        compile = device_type == 'cuda' or device_type == 'cpu' and long_run
        if compile:
            torch._dynamo.config.suppress_errors = True  # where it fails, go on without it
    # raw_model owns the weights and is saved; eval_model may be compiled; model is trained
    eval_model = raw_model
    if compile:
        print0('compiling the model (compile=False skips this)')
        if device_type == 'cpu' or fsdp:
            raw_model.compile_blocks()
        else:
            eval_model = torch.compile(raw_model)
    if fsdp:
        eval_model = shard(eval_model, device_type, dtype)
    else:
        eval_model.to(device)
    model = eval_model
    if ddp and not fsdp:
        model = DDP(eval_model, [device] if device_type == 'cuda' else None, gradient_as_bucket_view=True)

    # -- batches ------------------------------------------------------------------

    windows_per_step = gradient_accumulation_steps * batch_size
    # a window of text can start at any token; those of an epoch are a stride apart
    starts = {split: range(meta[f'{split}_tokens'] - block_size) for split in bins}
    stride = block_size
    if is_chat:
        ends = {}
        counts = {}
        for split in bins:
            starts[split], ends[split], counts[split] = document_windows(masks[split], block_size)
        stride = 1

    def load_batch(split, windows):
        """The inputs and targets of windows, which are indices in starts."""
        first = np.array([starts[split][window] for window in windows])
        last = ends[split][windows] if is_chat else None
        return load_windows(bins[split], meta['dtype'], first, block_size, device, masks[split], last)

    def get_batch(step):
        """This rank's micro-batches of a step, a pure function of (seed, step): its slice of the
        global batch, which is the same for any number of processes. Each is (inputs, targets,
        weight). The weights make the loss a mean over all targets of the global batch."""
        windows = shuffled_windows(len(starts['train']), stride, seed, step * windows_per_step,
                                   windows_per_step).reshape(world_size, micro_steps, batch_size)
        weights = np.full(micro_steps, 1 / micro_steps)
        if is_chat:
            n_counted = counts['train'][windows].sum(axis=2)
            weights = n_counted[rank] / (n_counted.sum() / world_size)  # the ranks' gradients are averaged
        return [(*load_batch('train', micro_batch), weight)
                for micro_batch, weight in zip(windows[rank], weights.tolist(), strict=True)]

    # -- optimizer ----------------------------------------------------------------

    if decay_lr and lr_schedule == 'cosine' and min_lr > learning_rate:
        raise UserError(f'min_lr={min_lr} exceeds learning_rate={learning_rate}: lower it')
    optimizers = raw_model.configure_optimizers(optimizer, weight_decay, learning_rate, (beta1, beta2))
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    iter_num = 0
    best_val_loss = math.inf
    elapsed = 0.0  # seconds of training before this process started
    wandb_id = None
    if resume:  # with the data and dropout of each step, this makes a resumed run exact
        saved_optimizers = checkpoint.get('optimizer') or {}
        if saved_optimizers.keys() != optimizers.keys():
            names = ' and '.join(saved_optimizers) or 'no optimizer'
            raise UserError(f'optimizer={optimizer!r}, but {ckpt_path} was trained with {names}: use '
                            f'the same, or start over from its weights: --init_from={ckpt_path}')
        for name in optimizers:
            load_optimizer(optimizers[name], saved_optimizers[name])
        if checkpoint.get('scaler'):
            scaler.load_state_dict(checkpoint['scaler'])
        iter_num = checkpoint['iter_num']
        same_data = os.path.join(DATA, checkpoint['config'].get('dataset', ''))
        if os.path.realpath(same_data) == os.path.realpath(os.path.join(DATA, dataset)):
            best_val_loss = checkpoint['best_val_loss']
        elapsed = checkpoint.get('elapsed', 0.0)
        wandb_id = checkpoint.get('wandb_id')
        print0(f'resuming {ckpt_path} at step {iter_num}')
        for name, value in checkpoint['config'].items():
            if name != 'init_from' and config.get(name, value) != value:
                print0(f'changed setting: {name} {value!r} -> {config[name]!r}')
        if iter_num >= max_iters and not eval_only:
            print0(f'all max_iters={max_iters} steps are done: raise max_iters and lr_decay_iters')
    checkpoint = None  # free its memory
    print0(f'{raw_model.num_params():,} parameters on {device} in {dtype}, '
           f'{optimizer} with learning rate {learning_rate}')
    print0(f'{tokens_per_step:,} tokens per step, {len(starts["train"]) / stride / windows_per_step:,.1f} '
           f'steps per epoch, {world_size} process{"es" if world_size > 1 else ""}')
    if extensions := beyond_gpt2(raw_model.config):
        print0(f"this model cannot be exported in GPT-2's format: it has {', '.join(extensions)}")

    # -- signals ------------------------------------------------------------------

    signals = []

    def on_signal(number, frame):
        """Ask the loop to save and stop. A second Ctrl-C ends the process at once."""
        signals.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    if not eval_only:
        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)
        # the terminal or ssh connection is gone, which nohup ignores and Windows does not know
        if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, on_signal)

    def max_over_ranks(number):
        """The maximum over all ranks, for decisions that they take together."""
        number = torch.tensor(int(number))
        if ddp:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def stop_signal():
        """The signal that asks to stop, or 0."""
        return max_over_ranks(signals[0] if signals else 0)

    # -- evaluation and logging ---------------------------------------------------

    @torch.no_grad()
    def estimate_loss(split):
        """Mean loss over windows spread evenly over the split, the same each time. Every rank
        evaluates its share. A signal cuts it short: torchrun kills workers 30 seconds later."""
        n_starts = len(starts[split])
        count = max(1, min(eval_iters, math.ceil(n_starts / stride) // batch_size))
        windows = np.linspace(0, n_starts - 1, count * batch_size).astype(np.int64)
        windows = windows.reshape(count, batch_size)
        sums = []  # of losses, and of the targets that count
        eval_model.eval()
        for i in range(rank, math.ceil(count / world_size) * world_size, world_size):
            if stop_signal():
                return math.nan
            # some ranks repeat a batch at the end, since FSDP needs all ranks in every forward pass
            x, y = load_batch(split, windows[i % count])
            with autocast:
                _, loss = eval_model(x, y)
            counted = (y >= 0).sum().float()
            sums.append(torch.stack([loss * counted, counted]))
        eval_model.train()
        n_own = len(range(rank, count, world_size))
        total = torch.stack(sums).cpu().double()[:n_own].sum(0)
        if ddp:
            dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def print_sample():
        """Print generated text that follows the end of a text, or the first character."""
        tok = get_tokenizer(meta['tokenizer'])
        start = torch.tensor([[tok.eot or 0]], device=device)
        raw_model.eval()
        with torch.compiler.set_stance('force_eager'):
            tokens = raw_model.generate(start, 200, temperature=0.8, top_k=200, vocab_size=tok.n_vocab)
            text = tok.decode_bytes([token.item() for token in tokens])
        raw_model.train()
        print0('| ' + text.decode('utf-8', 'replace').replace('\n', '\n| '))

    if fsdp and sample_interval:
        raise UserError("sample_interval needs a whole model: with parallel='fsdp' use 0")
    if rank == 0 and not eval_only:
        if wandb_log:
            wandb = optional('wandb', 'wandb_log=True')
            wandb_id = wandb.init(project=wandb_project, name=wandb_run_name, config=config,
                                  id=wandb_id, resume='allow').id
        log_path = os.path.join(out_dir, 'log.jsonl')
        os.makedirs(out_dir, exist_ok=True)
        if not resume:
            set_aside(out_dir)
        truncate_log(log_path, iter_num)
        log_file = open(log_path, 'ab', buffering=0)

    def seconds_trained():
        return elapsed + time.time() - start_time

    def log(**values):
        if rank > 0 or eval_only:
            return
        entry = dict(iter=iter_num, **values, seconds=round(seconds_trained(), 3))
        try:
            log_file.write((json.dumps(entry) + '\n').encode())
        except OSError as error:  # do not stop because the disk is full
            print0(f'warning: {log_path}: {error}')
        if wandb_log:
            wandb.log(values, step=iter_num)

    advice = (f'resume from the last checkpoint with a learning_rate below {learning_rate}'
              + (', or with grad_clip=1' if grad_clip == 0 else ''))

    def save(name, **more):
        """Write a checkpoint to out_dir. A failed save does not stop the run: returns the reason,
        on every rank, or '' after success."""
        state = dict(
            model=raw_model.state_dict(), model_args=vars(raw_model.config), config=config,
            tokenizer=meta['tokenizer'], chat=meta.get('chat'), iter_num=iter_num,
            elapsed=seconds_trained(), wandb_id=wandb_id, **more)
        if fsdp:
            state = tree_map(gather, state)
            state['model']['lm_head.weight'] = state['model']['transformer.wte.weight']  # tied
        problem = ''
        if rank == 0:
            if not all(w.isfinite().all() for w in state['model'].values()):
                raise UserError(f'a weight is not finite at step {iter_num}, nothing saved: {advice}')
            try:
                save_checkpoint(state, os.path.join(out_dir, name))
            except OSError as error:
                problem = str(error)
        if ddp:
            message = [problem]
            dist.broadcast_object_list(message)  # the other ranks wait here
            problem = message[0]
        if problem:
            print0(f'warning: {problem}; training continues, and the next save tries again')
        return problem

    def save_all():
        states = {name: opt.state_dict() for name, opt in optimizers.items()}
        return save('ckpt.pt', best_val_loss=best_val_loss, optimizer=states, scaler=scaler.state_dict())

    # -- training loop ------------------------------------------------------------

    model.train()
    gc.freeze()  # keep the garbage collector from rescanning long-lived objects
    peak = peak_flops(device, dtype)
    start_time = time.time()
    saved_time = start_time
    logged_time, logged_iter = start_time, iter_num
    skipped = 0      # consecutive steps
    stop = 0         # the signal that stops the run
    unsaved = ''     # why the last save failed
    next_batch = get_batch(iter_num)
    while True:
        # evaluate and save, every eval_interval steps and at the end
        if iter_num % eval_interval == 0 or iter_num >= max_iters or eval_only:
            train_loss = estimate_loss('train')
            val_loss = estimate_loss('val')
            stop = stop_signal()
            if stop:  # the evaluation may be incomplete
                unsaved = save_all()
                break
            print0(f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}')
            log(train_loss=train_loss, val_loss=val_loss, tokens=iter_num * tokens_per_step)
            if eval_only:
                break
            if not math.isfinite(val_loss):
                raise UserError(f'val loss is {val_loss} at step {iter_num}, nothing saved: {advice}')
            if sample_interval and iter_num % sample_interval == 0 and rank == 0:
                print_sample()
            improved = val_loss < best_val_loss
            if improved and not save('best.pt', best_val_loss=val_loss):
                best_val_loss = val_loss
            if improved or always_save_checkpoint or iter_num >= max_iters:
                unsaved = save_all()  # also at step 0, to notice a full disk early
                saved_time = time.time()
            logged_time, logged_iter = time.time(), iter_num
        if iter_num >= max_iters:
            break

        # learning rate and dropout depend on the step alone, so that a resumed run repeats them
        lr = learning_rate
        if decay_lr:
            lr = get_lr(iter_num, learning_rate, warmup_iters, lr_hold_iters, lr_decay_iters,
                        min_lr, lr_schedule)
        for opt in optimizers.values():
            for group in opt.param_groups:
                group['lr'] = lr
        if dropout:
            step_seed = np.random.SeedSequence((seed, iter_num, rank)).generate_state(1)[0]
            torch.manual_seed(int(step_seed))

        # forward and backward, micro-batch by micro-batch
        step_loss = 0
        for micro_step, (x, y, weight) in enumerate(next_batch):
            last = micro_step == micro_steps - 1  # only then do the ranks exchange gradients
            if fsdp:
                model.set_requires_gradient_sync(last)
            elif ddp:
                model.require_backward_grad_sync = last
            with autocast:
                _, loss = model(x, y)
                loss = loss * weight
            scaler.scale(loss).backward()
            step_loss += loss.detach()

        # clip the gradient; its norm is over all parameters and ranks
        for opt in optimizers.values():
            scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        next_batch = get_batch(iter_num + 1)  # prefetch while the GPU computes
        if fsdp:
            norm = norm.full_tensor()
        norm = norm.item()  # waits for the GPU

        # take the step, unless the gradient overflowed
        if math.isfinite(norm):
            skipped = 0
            for opt in optimizers.values():
                scaler.step(opt)
        else:
            skipped += 1
            print0(f'iter {iter_num}: skipped: gradient norm is {norm}, {skipped} in a row')
            log(skipped=skipped)
            if skipped >= max_skipped:
                raise UserError(f'{skipped} consecutive gradients were not finite: {advice}')
        scaler.update()
        model.zero_grad(set_to_none=True)

        # log the mean loss over all ranks
        if iter_num % log_interval == 0 and not skipped:
            step_loss = step_loss.cpu() / world_size
            if ddp:
                dist.all_reduce(step_loss)
            now = time.time()
            seconds = (now - logged_time) / (iter_num + 1 - logged_iter)
            logged_time, logged_iter = now, iter_num + 1
            tokens_per_second = tokens_per_step / seconds
            eta = datetime.timedelta(seconds=round(seconds * (max_iters - iter_num - 1)))
            mfu = f', mfu {flops_per_step / seconds / (peak * world_size):.1%}' if peak else ''
            print0(f'iter {iter_num}: loss {step_loss:.4f}, eta {eta}, {seconds * 1000:.1f}ms, '
                   f'{tokens_per_second:,.0f} tok/s{mfu}, lr {lr:.1e}, norm {norm:.2f}',
                   transient=True)
            log(loss=step_loss.item(), lr=lr, grad_norm=norm, time_ms=seconds * 1000,
                tokens_per_second=tokens_per_second, tokens=(iter_num + 1) * tokens_per_step)
        iter_num += 1

        # save when it is time, stop when a signal asks for it: all ranks at the same step
        stop = stop_signal()
        save_due = time.time() - saved_time > save_interval * 60
        if stop or save_interval and max_over_ranks(save_due):
            unsaved = save_all()
            saved_time = time.time()
        if stop:
            break

    # -- the end ------------------------------------------------------------------

    if stop:
        print0(f'stopped by {signal.Signals(stop).name} at step {iter_num}')
        if not unsaved:
            args = [arg for arg in sys.argv if not arg.startswith('--init_from=')]
            launcher = 'torchrun ...' if ddp else 'python'
            print0(f'saved {ckpt_path}. Resume with\n'
                   f'{launcher} {shlex.join(args)} --init_from=resume')
    elif not eval_only and best_val_loss < math.inf:
        sample = sys.argv[0].replace('train.py', 'sample.py')
        print0(f'best val loss {best_val_loss:.4f}, weights in {out_dir}/best.pt. Sample with\n'
               f'python {shlex.join([sample, f"--out_dir={out_dir}"])}' + is_chat * ' --interactive=True')
    if rank == 0 and not eval_only:
        log_file.close()
        if wandb_log:
            wandb.finish()
    code = 128 + stop if stop else 0
    if unsaved and rank == 0:
        print(f'error: the last steps were not saved: {unsaved}', file=sys.stderr, flush=True)
        code = 2
    if ddp:
        exit_together(code)
    sys.exit(code)
