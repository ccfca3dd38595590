"""
Train a GPT.

$ python train.py config/train_shakespeare.py                # from scratch
$ python train.py config/train_shakespeare.py --init_from=resume
$ python train.py config/finetune_shakespeare.py --init_from=gpt2
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""
import datetime
import gc
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as whole
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_map

from configurator import (
    UserError,
    check,
    configure,
    optional,
    printable,
    resolve_device,
    resolve_dtype,
    writing,
)
from model import GPT, config_from_settings, configure_optimizers, keep_memory, load_checkpoint, peak_flops
from prepare import get_tokenizer, load_dataset, load_windows, lock_folder, shuffled_windows

# input and output
out_dir = 'out'           # folder for ckpt.pt, best.pt and log.jsonl
init_from = 'scratch'     # 'scratch', 'resume' or 'auto' (resume if out_dir has a run), or a model: gpt2-xl
eval_interval = 2000      # steps between evaluations, which also save
eval_iters = 200          # maximum number of batches (of batch_size) in an evaluation
eval_only = False         # evaluate once and exit
log_interval = 1          # steps between log lines
sample_interval = 0       # steps between text samples, at evaluations; 0: never
always_save_checkpoint = True  # False: save ckpt.pt only at the end and when the val loss improves
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
activation = 'gelu'       # nonlinearity of the MLP: 'gelu' or 'relu2'
# optimizer
optimizer = 'adamw'       # 'adamw', or 'muon' for the blocks' matrices and AdamW for the rest
learning_rate = 6e-4      # peak learning rate
max_iters = 600000        # number of training steps
weight_decay = 1e-1       # weight decay of matrices; biases and norms have none
beta1 = 0.9               # AdamW's decay rate of the mean gradient, Muon's momentum
beta2 = 0.95              # AdamW's decay rate of the mean squared gradient
grad_clip = 1.0           # maximum gradient norm; 0: off
decay_lr = True           # False: constant learning rate, without warmup
lr_schedule = 'cosine'    # 'cosine' decays to min_lr, 'linear' to zero
warmup_iters = 2000       # steps of linear warmup
lr_hold_iters = 0         # steps at the peak learning rate between warmup and decay
lr_decay_iters = 0        # step at which the decay ends; 0: max_iters
min_lr = 6e-5             # final learning rate of 'cosine', usually learning_rate / 10
# system
seed = 1337               # random seed of initial weights, data order and dropout
device = 'auto'           # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best available
dtype = 'auto'            # 'float32', 'bfloat16', 'float16'; auto: the best on a GPU, float32 on a CPU
compile = 'auto'          # torch.compile: True, False; auto: on CUDA, and in long runs on a CPU
parallel = 'ddp'          # under torchrun: 'ddp', or 'fsdp' to shard the model over the processes
activation_checkpointing = False  # recompute activations in the backward pass: less memory, slower
backend = 'nccl'          # torch.distributed backend for CUDA; CPUs use gloo
timeout = 30.0            # minutes to wait for another process before giving up

config = configure(globals())
check(config, 'eval_interval > 0', 'eval_iters > 0', 'log_interval > 0', 'batch_size > 0',
      'gradient_accumulation_steps > 0', 'seed >= 0', 'grad_clip >= 0', "optimizer in ('adamw', 'muon')",
      "lr_schedule in ('cosine', 'linear')", "parallel in ('ddp', 'fsdp')",
      "compile in (True, False, 'auto')", 'learning_rate >= 0', 'max_iters >= 0')
if decay_lr and lr_schedule == 'cosine' and min_lr > learning_rate:
    raise UserError(f'min_lr={min_lr} exceeds learning_rate={learning_rate}: lower it')
keep_memory()

# -- processes: one, or one of many that torchrun started -------------------------

ddp = 'RANK' in os.environ
rank = int(os.environ.get('RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))
fsdp = ddp and parallel == 'fsdp'
device = resolve_device(device)
device_type = device.partition(':')[0]
sys.stdout.reconfigure(errors='replace')  # for terminals that lack a character


def print0(line):
    try:
        if rank == 0:
            print(line, flush=True)
    except OSError:  # nobody reads it any more, or the disk is full: go on in silence
        sys.stdout = open(os.devnull, 'w')


if ddp:
    if device not in ('cpu', f"cuda:{os.environ['LOCAL_RANK']}"):
        raise UserError(f"device={config['device']!r} under torchrun must be 'cpu' or 'cuda'")
    dist.init_process_group(f'cpu:gloo,cuda:{backend}' if device_type == 'cuda' else 'gloo',
                            timeout=datetime.timedelta(minutes=timeout))
if gradient_accumulation_steps % world_size:
    raise UserError(f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of '
                    f'the {world_size} processes')
micro_steps = gradient_accumulation_steps // world_size

# -- data -------------------------------------------------------------------------

ckpt_path = os.path.join(out_dir, 'ckpt.pt')
if rank == 0:  # prepares the embedded text and decides; the others wait
    if not eval_only:
        run_lock = lock_folder(out_dir)  # until the process ends
    load_dataset(dataset)
    if init_from == 'auto':
        init_from = 'resume' if os.path.exists(ckpt_path) else 'scratch'
if ddp:
    message = [init_from]
    dist.broadcast_object_list(message)
    init_from = message[0]
meta, paths = load_dataset(dataset)
bins = {split: open(path, 'rb') for split, path in paths.items()}  # unchanged if prepare.py runs again
masks = dict.fromkeys(bins)
if meta.get('chat'):
    masks = {split: open(path.replace('.bin', '.mask'), 'rb') for split, path in paths.items()}

# -- model ------------------------------------------------------------------------

torch.manual_seed(seed)
resume = init_from == 'resume'
if init_from == 'scratch':
    padded = math.ceil(meta['vocab_size'] / 64) * 64  # GPUs are faster with multiples of 64
    raw_model = GPT(config_from_settings(config, vocab_size=padded))
else:
    path = ckpt_path if resume else init_from
    checkpoint = load_checkpoint(path, verify=rank == 0)
    if checkpoint['tokenizer'] != meta['tokenizer']:
        raise UserError(f"{path} and dataset={dataset} have different tokenizers "
                        f"({checkpoint['tokenizer']['type']}, {meta['tokenizer']['type']}): prepare the "
                        f'dataset with --tokenizer={path}')
    saved_size = checkpoint['model_args']['block_size']
    block_size = saved_size if resume else min(block_size, saved_size)
    raw_model = GPT.from_checkpoint(checkpoint, dropout=dropout, block_size=block_size)
    for name, value in vars(raw_model.config).items():  # the checkpoint decides the shape
        if config.get(name, value) != value:
            print0(f'{path} sets {name}={value!r}')
            config[name] = value
raw_model.recompute_activations = activation_checkpointing
n_starts = {}  # places where windows can start
n_windows = {}  # windows in an evaluation
for split, path in paths.items():
    n_tokens = meta[f'{split}_tokens']
    if n_tokens <= block_size:
        raise UserError(f'{path} has {n_tokens:,} tokens, too few for a block_size of {block_size}: '
                        'use a longer text or a smaller block_size')
    n_starts[split] = n_tokens - block_size
    n_windows[split] = min(eval_iters * batch_size, math.ceil((n_tokens - 1) / block_size))
if rank == 0:  # what the best val loss is measured on
    digest = hashlib.sha256()
    for file in filter(None, (bins['val'], masks['val'])):
        digest.update(np.memmap(file, np.uint8, 'r'))
    val_set = [digest.hexdigest(), n_windows['val']]

dtype = resolve_dtype(dtype, device)
if dtype == 'float16' and fsdp:
    raise UserError("dtype='float16' does not work with parallel='fsdp': use ddp, or --dtype=float32")
autocast = torch.autocast(device_type, getattr(torch, dtype), enabled=dtype != 'float32')
tokens_per_step = gradient_accumulation_steps * batch_size * block_size
flops_per_step = raw_model.flops_per_token() * tokens_per_step
print0(f'{raw_model.num_params():,} parameters on {device} in {dtype}, '
       f'{optimizer} with learning rate {learning_rate}')
print0(f'{tokens_per_step:,} tokens per step, {n_starts["train"] / tokens_per_step:,.1f} steps per epoch, '
       f'{world_size} process{"es" if world_size > 1 else ""}')

if compile == 'auto':
    long_run = flops_per_step * max_iters / world_size > 1e14  # about ten minutes
    compile = device_type == 'cuda' or device_type == 'cpu' and long_run
    try:
        if compile:  # something small first
            torch.compile(torch.exp)(torch.ones(2, device=device))
    except Exception as error:
        print0(f'warning: training is slower, torch.compile fails: {error}'.split('\n')[0])
        compile = False
if compile:  # in place, and so is fully_shard: raw_model keeps its names
    print0('compiling the model (compile=False skips this)')
    if device_type == 'cpu' or fsdp:
        raw_model.compile_blocks()
    else:
        raw_model.compile()
if fsdp:  # each block's weights are gathered when it runs, in dtype on a GPU
    mesh = dist.init_device_mesh(device_type, (world_size,))
    param_dtype = getattr(torch, dtype) if device_type == 'cuda' else None
    policy = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
    for block in raw_model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(raw_model, mesh=mesh)
else:
    raw_model.to(device)
model = raw_model
if ddp and not fsdp:
    model = DDP(raw_model, [device] if device_type == 'cuda' else None, gradient_as_bucket_view=True)

# -- optimizers, and where a resumed run continues --------------------------------

optimizers = configure_optimizers(raw_model, optimizer, weight_decay, learning_rate, (beta1, beta2))
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
full = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)  # also of sharded models
iter_num = 0
best_val_loss = math.inf
best_iter = 0  # the step that had it
elapsed = 0.0  # seconds of training before this process started
wandb_id = None
if resume:  # with the data and dropout of each step, this makes a resumed run exact
    iter_num = checkpoint['iter_num']
    best_path = os.path.join(out_dir, 'best.pt')
    if rank == 0 and os.path.exists(best_path):  # rank 0 knows what is the best
        best = load_checkpoint(best_path, verify=False)
        if best.get('val_set') == val_set:
            best_val_loss = best['best_val_loss']
            best_iter = best['iter_num']
    elapsed = checkpoint.get('elapsed', 0.0)
    wandb_id = checkpoint.get('wandb_id')
    print0(f'resuming {ckpt_path} at step {iter_num}')
    for name, value in checkpoint['config'].items():
        if name != 'init_from' and config.get(name, value) != value:
            print0(f'changed setting: {name} {value!r} -> {config[name]!r}')
    if checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
if resume and iter_num > 0:
    def shapes(state):  # fused optimizers do not check them
        return tree_map(lambda value: getattr(value, 'shape', None), state)

    fresh = whole.get_optimizer_state_dict(raw_model, optimizers)  # has the current settings
    if shapes(checkpoint['optimizer']) != shapes(fresh['state']):
        raise UserError(f'{ckpt_path} has no state of optimizer={optimizer!r} for this model: use the '
                        'optimizer that it was trained with, or start a new run from its weights: '
                        f'--init_from={ckpt_path}')
    fresh['state'] = checkpoint['optimizer']
    whole.set_optimizer_state_dict(raw_model, optimizers, fresh, options=full)
checkpoint = best = fresh = None  # free their memory

# -- batches ----------------------------------------------------------------------

windows_per_step = gradient_accumulation_steps * batch_size


def load_batch(split, starts):
    """The inputs and targets of windows."""
    batch = torch.from_numpy(load_windows(bins[split], meta['dtype'], starts, block_size, masks[split]))
    if device_type == 'cuda':
        return batch.pin_memory().to(device, non_blocking=True)  # copies while the GPU computes
    return batch.to(device)


def get_batch(step):
    """This rank's micro-batches of a step, a pure function of (seed, step): its slice of the
    global batch, which is the same for any number of processes. Each is (inputs, targets,
    weight). The weights make the loss a mean over all targets of the global batch."""
    starts = shuffled_windows(n_starts['train'], block_size, seed, step * windows_per_step, windows_per_step)
    starts = starts.reshape(world_size, micro_steps, batch_size)
    weights = np.full(micro_steps, 1 / micro_steps)
    if masks['train']:
        mask = np.memmap(masks['train'], np.uint8, 'r')
        counted = mask[starts[..., None] + np.arange(1, block_size + 1)].sum(axis=(2, 3))
        weights = counted[rank] / max(1, counted.sum()) * world_size  # the ranks' gradients are averaged
    return [(*load_batch('train', micro_batch), weight)
            for micro_batch, weight in zip(starts[rank], weights.tolist(), strict=True)]


# -- signals ----------------------------------------------------------------------

signals = []


def on_signal(number, frame):
    """Ask the loop to save and stop. A second Ctrl-C ends the process at once."""
    signals.append(number)
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)


def max_over_ranks(number):
    """The maximum over all ranks, for decisions that they take together."""
    number = torch.tensor(int(number))
    if ddp:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def stop_signal():
    """The signal that asks any of the ranks to stop, or 0."""
    return max_over_ranks(signals[0] if signals else 0)


if not eval_only:
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    # the terminal or ssh connection is gone, which nohup ignores and Windows does not know
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, on_signal)

# -- evaluation, logging and saving -----------------------------------------------


@torch.no_grad()
def estimate_loss(split):
    """Mean loss over windows spread evenly over the split, the same each time. Every rank
    evaluates its share. A signal cuts it short: torchrun kills workers 30 seconds later."""
    starts = np.linspace(0, n_starts[split] - 1, n_windows[split]).astype(np.int64)
    stride = batch_size * world_size
    padded = np.resize(starts, math.ceil(len(starts) / stride) * stride)  # so that batches are full
    sums = []  # of losses, and of the targets that count
    raw_model.eval()
    for i in range(rank * batch_size, len(padded), stride):
        if stop_signal():
            return math.nan
        x, y = load_batch(split, padded[i:i + batch_size])
        y[max(0, len(starts) - i):] = -1  # the padding does not count
        with autocast:
            _, loss = raw_model(x, y)
        counted = (y >= 0).sum().float()
        sums.append(torch.stack([loss * counted, counted]))
    raw_model.train()
    total = torch.stack(sums).cpu().double().sum(0)
    if ddp:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def print_sample():
    """Print generated text that follows the end of a text or the vocabulary's first character."""
    tok = get_tokenizer(meta['tokenizer'])
    start = torch.tensor([[tok.eot or 0]], device=device)
    raw_model.eval()
    with torch.compiler.set_stance('force_eager'):
        ids = raw_model.generate(start, 200, temperature=0.8, top_k=200, vocab_size=tok.n_vocab)
    raw_model.train()
    text = tok.decode_bytes(ids[0, 1:].tolist()).decode('utf-8', 'replace')
    print0('| ' + printable(text).replace('\n', '\n| '))


def set_aside(names, reason):
    """Move files in out_dir, if they exist, into a new folder there."""
    files = [name for name in names if os.path.exists(os.path.join(out_dir, name))]
    if files:
        number = 1
        while os.path.exists(folder := os.path.join(out_dir, f'earlier-{number}')):
            number += 1
        os.mkdir(folder)
        for name in files:
            os.rename(os.path.join(out_dir, name), os.path.join(folder, name))
        print0(f'moved {", ".join(files)} to {folder}: {reason}')


if fsdp and sample_interval:
    raise UserError("sample_interval needs a whole model: with parallel='fsdp' use 0")
if rank == 0 and not eval_only:
    if wandb_log:
        wandb = optional('wandb', 'wandb_log=True')
        wandb_id = wandb.init(project=wandb_project, name=wandb_run_name, config=config,
                              id=wandb_id, resume='allow').id
    if not resume:
        set_aside(['ckpt.pt', 'best.pt', 'log.jsonl'], 'an earlier run')
    elif best_val_loss == math.inf:
        set_aside(['best.pt'], 'its val loss was measured on other windows')
    log_file = open(os.path.join(out_dir, 'log.jsonl'), 'ab', buffering=0)


def log(**values):
    """Append to log.jsonl. A resumed run may repeat steps: their last entries count."""
    if rank > 0 or eval_only:
        return
    entry = dict(iter=iter_num, **values, seconds=round(elapsed + time.perf_counter() - start_time, 3))
    try:
        log_file.write((json.dumps(entry) + '\n').encode())
    except OSError as error:  # do not stop because the disk is full
        print0(f'warning: {out_dir}/log.jsonl: {error}')
    if wandb_log:
        wandb.log(values, step=iter_num)


def save(name, optimizers):
    """Write a checkpoint to out_dir, and return whether it worked. Only the last one must."""
    weights, optimizer_state = whole.get_state_dict(raw_model, optimizers, options=full)
    if rank > 0:
        return True
    weights['lm_head.weight'] = weights['transformer.wte.weight']  # tied: stored once
    checkpoint = dict(
        model=weights, model_args=vars(raw_model.config), config=config, tokenizer=meta['tokenizer'],
        chat=meta.get('chat'), iter_num=iter_num, best_val_loss=best_val_loss, val_set=val_set,
        optimizer=optimizer_state.get('state', {}), scaler=scaler.state_dict(),
        elapsed=elapsed + time.perf_counter() - start_time, wandb_id=wandb_id)
    try:
        with writing(os.path.join(out_dir, name)) as file:
            torch.save(checkpoint, file)
    except OSError as error:
        if stop or iter_num >= max_iters:
            raise
        print0(f'warning: {error}; training continues, and the next save tries again')
        return False
    return True


def save_all():
    save('ckpt.pt', optimizers if iter_num > 0 else [])  # before the first step they have no state


def get_lr(step):
    """Linear warmup, then constant for lr_hold_iters, then cosine or linear decay."""
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    decay_start = warmup_iters + lr_hold_iters
    progress = (step - decay_start) / max(1, (lr_decay_iters or max_iters) - decay_start)
    remaining = 1 - max(0, min(1, progress))  # from 1 down to 0
    if lr_schedule == 'linear':
        return learning_rate * remaining
    return min_lr + (learning_rate - min_lr) * (1 - math.cos(math.pi * remaining)) / 2


# -- training loop ----------------------------------------------------------------

model.train()
gc.freeze()  # keep the garbage collector from rescanning long-lived objects
peak = peak_flops(device, dtype)
start_time = time.perf_counter()
logged_time, logged_iter = start_time, iter_num
stop = 0  # the signal that stops the run
next_batch = get_batch(iter_num)
while True:
    # evaluate and save, every eval_interval steps and at the end
    if iter_num % eval_interval == 0 or iter_num >= max_iters or eval_only:
        train_loss = estimate_loss('train')
        val_loss = estimate_loss('val')
        stop = stop_signal()
        if stop:  # the evaluation may be incomplete
            save_all()
            break
        print0(f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}')
        log(train_loss=train_loss, val_loss=val_loss, tokens=iter_num * tokens_per_step)
        if eval_only:
            break
        if not math.isfinite(val_loss):
            raise UserError(f'val loss is {val_loss} at step {iter_num}: resume from the last checkpoint '
                            f'with a learning_rate below {learning_rate}')
        if sample_interval and iter_num % sample_interval == 0 and rank == 0:
            print_sample()
        improved = max_over_ranks(rank == 0 and val_loss < best_val_loss)
        if improved:
            previous = best_val_loss, best_iter
            best_val_loss, best_iter = val_loss, iter_num
            if not save('best.pt', []):
                best_val_loss, best_iter = previous
        if improved or always_save_checkpoint or iter_num >= max_iters:
            save_all()  # also at step 0, to notice a full disk early
        logged_time, logged_iter = time.perf_counter(), iter_num
    if iter_num >= max_iters:
        break

    # learning rate and dropout depend on the step, not on earlier ones: a resumed run repeats them
    lr = get_lr(iter_num)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
    if dropout:
        step_seed = np.random.SeedSequence((seed, iter_num, rank)).generate_state(1)[0]
        torch.manual_seed(int(step_seed))

    # forward and backward, micro-batch by micro-batch
    step_loss = 0
    for micro_step, (x, y, weight) in enumerate(next_batch):
        if ddp and not fsdp:  # DDP exchanges gradients once; FSDP each time, to keep only shards of them
            model.require_backward_grad_sync = micro_step == micro_steps - 1
        with autocast:
            _, loss = model(x, y)
            loss = loss * weight
        scaler.scale(loss).backward()
        step_loss += loss.detach()

    # clip the gradient; its norm is over all parameters and ranks
    for opt in optimizers:
        scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    next_batch = get_batch(iter_num + 1)  # prefetch while the GPU computes
    if fsdp:
        norm = norm.full_tensor()
    norm, step_loss = torch.stack([norm, step_loss]).tolist()  # waits for the GPU, once a step

    # take the step, unless the gradient overflowed
    if math.isfinite(norm):
        for opt in optimizers:
            scaler.step(opt)
    else:
        print0(f'iter {iter_num}: skipped: gradient norm is {norm}')
        log(skipped=True)
    scaler.update()
    model.zero_grad(set_to_none=True)

    # log the mean loss over all ranks
    if iter_num % log_interval == 0:
        step_loss = torch.tensor(step_loss / world_size)
        if ddp:
            dist.all_reduce(step_loss)
        now = time.perf_counter()
        seconds = max(1e-9, now - logged_time) / (iter_num + 1 - logged_iter)
        logged_time, logged_iter = now, iter_num + 1
        tokens_per_second = tokens_per_step / seconds
        eta = datetime.timedelta(seconds=round(seconds * (max_iters - iter_num - 1)))
        mfu = f', mfu {flops_per_step / seconds / (peak * world_size):.1%}' if peak else ''
        print0(f'iter {iter_num}: loss {step_loss:.4f}, norm {norm:.2f}, '
               f'{tokens_per_second:,.0f} tok/s{mfu}, eta {eta}')
        log(loss=step_loss.item(), lr=lr, grad_norm=norm, time_ms=seconds * 1000,
            tokens_per_second=tokens_per_second, tokens=(iter_num + 1) * tokens_per_step)
    iter_num += 1

    # stop when a signal asks for it: all ranks at the same step
    stop = stop_signal()
    if stop:
        save_all()
        break

# -- the end ----------------------------------------------------------------------

if stop:
    args = [arg for arg in sys.argv if not arg.startswith('--init_from=')]
    print0(f'stopped by {signal.Signals(stop).name} at step {iter_num}, saved {ckpt_path}. Resume with\n'
           f'{"torchrun ..." if ddp else "python"} {shlex.join(args)} --init_from=resume')
elif not eval_only:
    print0(f'best val loss {best_val_loss:.4f} at step {best_iter}: {out_dir}/best.pt')
    if best_iter < iter_num:
        print0('it has not improved since: use more text, fewer steps or more dropout')
    print0(f'Sample with\npython {shlex.join(["sample.py", f"--out_dir={out_dir}"])}')
if rank == 0 and not eval_only:
    log_file.close()
    if wandb_log:
        wandb.finish()
code = 128 + stop if stop else 0
if ddp:  # wait for all ranks; os._exit skips the shutdown of gloo's threads, which can crash
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(code)
if code:
    sys.exit(code)
