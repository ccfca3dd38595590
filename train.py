"""
Train a GPT.

$ python train.py config/train_shakespeare.py                                  # from nothing, on the embedded text
$ python train.py config/train_shakespeare.py --init_from=resume               # go on where it stopped
$ python train.py config/finetune_shakespeare.py --init_from=gpt2              # finetune OpenAI's weights
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py       # on 8 GPUs
$ torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 --master_port=1234 --nproc_per_node=8 train.py ...  # node 0
"""
import contextlib
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
import socket
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._pytree import tree_leaves, tree_map

from configurator import UserError, check, configure, keep_memory, optional, resolve
from model import GPT, PRETRAINED, GPTConfig, find_pretrained, load_checkpoint
from prepare import DATA, DATASETS, SHAKESPEARE, get_tokenizer, load_dataset, prepare

# in and out
out_dir = 'out'                # where ckpt.pt, best.pt and log.jsonl go
init_from = 'scratch'          # 'scratch', 'resume' (the run in out_dir), or a model to finetune: gpt2-xl, out-mine...
eval_interval = 2000           # steps from one evaluation, and save, to the next
eval_iters = 200               # batches in an evaluation, at most
eval_only = False              # evaluate once and leave
log_interval = 1               # steps from one log line to the next
sample_interval = 0            # at evaluations so many steps apart it writes a little, to be looked at; 0: never
always_save_checkpoint = True  # False: at evaluations save ckpt.pt only when the val loss has improved
save_interval = 0.0            # minutes from one save to the next, besides those at evaluations; 0: only these
wandb_log = False              # also log to Weights & Biases
wandb_project = 'owt'
wandb_run_name = 'gpt2'
tensorboard_log = False        # also log to TensorBoard, in out_dir
# data
dataset = 'openwebtext'        # a folder in data/ that prepare.py wrote, or an absolute path
batch_size = 12                # windows in a micro-batch of one process
block_size = 1024              # tokens in a window
gradient_accumulation_steps = 5 * 8  # micro-batches in a step, over all processes together
# model
n_layer = 12                   # blocks
n_head = 12                    # attention heads in a block
n_embd = 768                   # width: numbers for each token
dropout = 0.0                  # 0 for pretraining; 0.1 and more for finetuning and for texts read many times
bias = False                   # biases in linear layers and LayerNorms
rope = False                   # rotary positions instead of learned ones
qk_norm = False                # normalised queries and keys
relu2 = False                  # squared ReLU instead of GELU
# optimizer
optimizer = 'adamw'            # 'adamw'; 'muon': torch.optim.Muon for the blocks' matrices, AdamW for the rest
learning_rate = 6e-4           # at its highest
max_iters = 600000             # steps to train
weight_decay = 1e-1            # of matrices; vectors never decay
beta1 = 0.9                    # how long gradients are remembered
beta2 = 0.95                   # and their squares
grad_clip = 1.0                # longest gradient; 0: any
max_skipped = 20               # steps in a row whose gradient is not finite: each is skipped, after so many it stops
decay_lr = True                # False: constant, with no warmup either
lr_schedule = 'cosine'         # 'cosine': half a wave down to min_lr; 'linear': straight down to zero
warmup_iters = 2000            # steps in which the learning rate rises
lr_hold_iters = 0              # steps at its highest, before it decays
lr_decay_iters = 600000        # step at which its decay ends, usually max_iters
min_lr = 6e-5                  # where cosine ends, usually a tenth of learning_rate
# system
seed = 1337                    # of initial weights, order of the data and dropout
device = 'auto'                # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
dtype = 'auto'                 # of the arithmetic: 'float32', 'bfloat16', 'float16'; auto: what the device is good at
compile = 'auto'               # torch.compile: True, False; auto: on CUDA, and for long runs on a CPU
parallel = 'ddp'               # under torchrun: 'ddp', a whole model in each process; 'fsdp', shared out among all
activation_checkpointing = False  # compute them again instead of keeping them: less memory, one more forward pass
backend = 'nccl'               # how CUDA devices talk under torchrun; CPUs always use gloo
timeout = 30.0                 # minutes that a process waits for another, before it takes that for lost

# dense bfloat16 (float16 where older) peak in TFLOPs by device name, from the makers' data sheets; the first that fits
PEAK = {'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'A100': 312, 'L40S': 362, 'L4': 121, 'A10': 125,
        'V100': 125, 'T4': 65, 'RTX 4090': 165, 'RTX 3090': 71}


def peak_flops(device, dtype):
    """The device's peak, or None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.startswith('cuda') and dtype != 'float32' else ''
    return next((tflops * 1e12 for key, tflops in PEAK.items() if re.search(rf'\b{key}\b', name)), None)


def autocast_for(device, dtype):
    """The context in which matrix products are computed in dtype while weights stay float32."""
    return torch.autocast(device.partition(':')[0], getattr(torch, dtype), enabled=dtype != 'float32')


@functools.lru_cache(maxsize=2)
def epoch_windows(n_tokens, block_size, seed, epoch):
    """Where the windows of one epoch start: side by side from a random offset, in random order."""
    rng = np.random.default_rng((seed, epoch))
    count = max(1, n_tokens // block_size - 1)
    offset = rng.integers(n_tokens - count * block_size)
    return offset + block_size * rng.permutation(count)


def train_starts(n_tokens, block_size, seed, first, count):
    """Where windows first, first + 1, ... of the endless sequence of epochs start."""
    per_epoch = max(1, n_tokens // block_size - 1)
    epoch, place = np.divmod(np.arange(first, first + count), per_epoch)
    return np.concatenate([epoch_windows(n_tokens, block_size, seed, e)[place[epoch == e]] for e in np.unique(epoch)])


def get_windows(path, dtype, starts, block_size, device):
    """The windows that start there, and the same shifted by one: inputs and targets, (len(starts), block_size)."""
    data = np.memmap(path, dtype, 'r')  # mapped anew each time: pages once read would count as this process's memory
    ids = torch.from_numpy(data[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    if device.startswith('cuda'):
        ids = ids.pin_memory()  # so that the copy runs beside the computation
    ids = ids.to(device, non_blocking=device.startswith('cuda'))
    return ids[:, :-1], ids[:, 1:]


def get_lr(step, peak, warmup, hold, decay_end, min_lr, schedule):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    begin = warmup + hold
    left = 1 - max(0, min(1, (step - begin) / max(1, decay_end - begin)))  # from 1 down to 0
    if schedule == 'linear':
        return peak * left
    return min_lr + (peak - min_lr) * (1 - math.cos(math.pi * left)) / 2


def backward(model, optimizers, scaler, batches, grad_clip, autocast):
    """The gradient of a step, a list of micro-batches. Returns their mean loss and the gradient's norm, which is the
    same in all processes, both still on the device."""
    total = 0
    for i, (x, y) in enumerate(batches):
        last = i == len(batches) - 1  # gradients are exchanged once, after the last micro-batch
        if isinstance(model, DDP):
            model.require_backward_grad_sync = last
        elif hasattr(model, 'set_requires_gradient_sync'):  # of FSDP
            model.set_requires_gradient_sync(last)
        with autocast:
            loss = model(x, y)[1] / len(batches)
        scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    return total, whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf))


def update(model, optimizers, scaler, norm):
    """Take the step, unless its gradient is not finite. Returns its norm, for which it waits for the device."""
    norm = norm.item()
    if math.isfinite(norm):
        for optimizer in optimizers.values():
            scaler.step(optimizer)
    scaler.update()
    model.zero_grad(set_to_none=True)
    return norm


def whole(tensor):
    """All of a tensor that FSDP has shared out; every process has to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def shard(model, device_type, dtype):
    """Share out weights, gradients and the optimizer's state among all processes. The weights of a block are gathered
    when its turn comes, on a GPU in dtype, and let go of after it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = dist.init_device_mesh(device_type, (dist.get_world_size(),))
    gathered = getattr(torch, dtype) if device_type == 'cuda' else None  # LayerNorm on a CPU cannot mix two dtypes
    policy = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def shard_like(p, value):
    """A whole tensor that belongs to the parameter p, such as its momentum, shared out as p is."""
    if not hasattr(p, 'full_tensor') or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)


def compiled(model, by_block):
    """Block by block: all are alike, so one is compiled for all, which suits the CPU and FSDP. As a whole, which takes
    longer, the loss is joined to the head, so that no float32 copy of all logits is made."""
    if not by_block:
        return torch.compile(model)
    for block in model.transformer.h:
        block.compile()
    return model


def compile_problem(model, batch, autocast):
    """Use a compiled model for the first time, which is when it is compiled: why that failed, or None."""
    try:
        with autocast:
            loss = model(*batch)[1]
        loss.backward()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a compiler, a driver or a kernel is missing: anything can come up
        return f"torch.compile failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    finally:
        model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def enough_memory(batch_size, accumulation):
    """Running out of memory in here ends in advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has an error of its own for this on CUDA alone
        if not isinstance(error, MemoryError) and not re.search('out of memory|allocate memory', str(error)):
            raise
        less = next((n for n in range(batch_size // 2, 0, -1) if batch_size % n == 0), None)
        advice = '--activation_checkpointing=True, or a smaller block_size or model'
        if less:
            advice = (f'--batch_size={less} --gradient_accumulation_steps={accumulation * batch_size // less}, which '
                      f'is the same global batch, or {advice}')
        reason = ' '.join(str(error).split())[:120]
        raise UserError(f'batch_size={batch_size} takes more memory than there is ({reason}): use {advice}') from None


def meeting_point(rank, timeout):
    """The store in which processes find each other; None: torch makes one. torchrun's own outlives its restarts, and so
    do the addresses of dead processes in it: there the first process only says at which port it has opened another."""
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return None
    address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    torchrun = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    store, given_up = None, time.time() + timeout.total_seconds()
    if rank == 0:
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        torchrun.set('port', str(store.port))
    while store is None:
        try:
            port = int(torchrun.get('port'))
            socket.create_connection((address, port), 5).close()  # refused in silence, where TCPStore prints a stack
            store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=5))
        except (OSError, dist.DistError) as error:  # the port of one that is dead: the new one is yet to come
            if time.time() > given_up:
                minutes = timeout.total_seconds() / 60
                raise UserError(f'process {rank} waited for the first one, at most timeout={minutes:g} minutes, in '
                                f'vain: {error}') from None
            time.sleep(0.1)
    store.set_timeout(timeout)
    return store


def leave(code):
    """End a process among several, when all have come here, at once: Python's own end now and then meets a thread of
    gloo that still lets go of tensors, and aborts."""
    dist.barrier()  # nobody leaves while rank 0 still writes
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(code)


def save(checkpoint, path):
    """Write a checkpoint so that at any moment, power cuts included, path is the old one or the new one, whole. Returns
    what went wrong, or None."""
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error:  # a RuntimeError of torch's writer stands for any error of the file's
        free, needed = 0, sum(t.nbytes for t in tree_leaves(checkpoint) if torch.is_tensor(t))
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        with contextlib.suppress(OSError):  # the folder itself may be gone
            free = shutil.disk_usage(os.path.dirname(path) or '.').free
        return (f'{path} could not be saved ({str(error).splitlines()[0][:120]}): it takes {needed / 1e6:,.1f} MB and '
                f'{free / 1e6:,.1f} MB are free there')
    with contextlib.suppress(OSError):  # not every system and file system can do this for a folder
        folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def set_aside(out_dir):
    """Move an earlier run's files from out_dir into a folder within it."""
    files = [name for name in ('ckpt.pt', 'best.pt', 'log.jsonl') if os.path.exists(os.path.join(out_dir, name))]
    if files and files != ['log.jsonl']:
        number = 1
        while os.path.exists(earlier := os.path.join(out_dir, f'earlier-{number}')):
            number += 1
        os.mkdir(earlier)
        for name in files:
            os.rename(os.path.join(out_dir, name), os.path.join(earlier, name))
        print(f'{out_dir} holds an earlier run: moved to {earlier}')


def cut_log(path, iter_num):
    """Drop what the log says of steps from iter_num on, which will be taken again, and half lines that kills left."""
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            entries = [re.fullmatch(r'{"iter": (\d+), [^{]*}\n', line) for line in f]
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(entry[0] for entry in entries if entry and int(entry[1]) < iter_num)
        os.replace(path + '.tmp', path)


if __name__ == '__main__':
    config = configure(globals())
    check(config, 'batch_size > 0', 'gradient_accumulation_steps > 0', 'eval_interval > 0', 'eval_iters > 0',
          'log_interval > 0', 'sample_interval >= 0', 'save_interval >= 0', 'max_iters >= 0', 'learning_rate >= 0',
          'min_lr >= 0', 'weight_decay >= 0', 'grad_clip >= 0', 'beta1 >= 0', 'beta1 < 1', 'beta2 >= 0', 'beta2 < 1',
          'seed >= 0', 'seed < 2**63', 'max_skipped > 0', 'timeout > 0', "lr_schedule in ('cosine', 'linear')",
          "optimizer in ('adamw', 'muon')", "parallel in ('ddp', 'fsdp')")
    keep_memory()
    device, dtype, compile = resolve(device, dtype, compile, width=n_embd)
    device_type = device.partition(':')[0]
    autocast = autocast_for(device, dtype)

    # one process, or one of many that torchrun started
    ddp, rank, world = 'RANK' in os.environ, int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if ddp:
        if device not in ('cpu', f"cuda:{os.environ['LOCAL_RANK']}"):
            raise UserError(f'device={config["device"]!r} under torchrun: leave it out, or say cpu or cuda')
        patience = datetime.timedelta(minutes=timeout)
        dist.init_process_group(f'cpu:gloo,cuda:{backend}' if device_type == 'cuda' else 'gloo', timeout=patience,
                                store=meeting_point(rank, patience), rank=rank, world_size=world)
    terminal = sys.stdout.isatty()

    def say(line, passing=False):
        """Print a line, of one process. In a terminal a passing one gives way to the next."""
        if rank == 0 and passing and terminal:
            print(line[:shutil.get_terminal_size().columns - 1], end='\x1b[K\r', flush=True)
        elif rank == 0:
            print(line, end='\x1b[K\n' if terminal else '\n', flush=True)

    if dtype == 'float16' and (optimizer == 'muon' or parallel == 'fsdp'):
        raise UserError("dtype='float16' is for cards without bfloat16, which optimizer='muon' and parallel='fsdp' "
                        'need: use another dtype, or --optimizer=adamw --parallel=ddp')
    if device_type == 'mps' and activation_checkpointing and dropout:
        raise UserError('activation_checkpointing=True: on mps torch would drop other activations the second time: use '
                        'dropout=0')
    if gradient_accumulation_steps % world:
        raise UserError(f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {world} '
                        f'processes: use {math.ceil(gradient_accumulation_steps / world) * world}')
    micro_steps = gradient_accumulation_steps // world
    tokens_per_step = gradient_accumulation_steps * batch_size * block_size

    # data
    if rank > 0:
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError as error:
            raise UserError(f'process {rank} waited for the first one to find dataset={dataset} and '
                            f'init_from={init_from}, at most timeout={timeout:g} minutes, in vain: '
                            f'{str(error).splitlines()[0]}') from None
    embedded = DATASETS.get(dataset, {}).get('source') == SHAKESPEARE
    if rank == 0 and embedded and not os.path.exists(os.path.join(DATA, dataset, 'train.bin')):
        prepare(dataset)
    meta, bins = load_dataset(dataset, scan=rank == 0)
    if rank == 0 and init_from in PRETRAINED:
        find_pretrained(init_from)
    if ddp and rank == 0:
        dist.all_reduce(torch.zeros(1))
    for split, path in bins.items():
        if meta[f'{split}_tokens'] <= block_size:
            raise UserError(f"{path} holds {meta[f'{split}_tokens']:,} tokens, too few for a window of block_size="
                            f'{block_size} and the token after it: take a longer text or a smaller block_size')

    def batches(step):
        """This process's micro-batches of a step: its slice of the global batch, which is the same for any world."""
        first = (step * gradient_accumulation_steps + rank * micro_steps) * batch_size
        starts = train_starts(meta['train_tokens'], block_size, seed, first, micro_steps * batch_size)
        return [get_windows(bins['train'], meta['dtype'], part, block_size, device)
                for part in starts.reshape(micro_steps, batch_size)]

    @torch.no_grad()
    def eval_loss(split):
        """Mean loss over windows spread evenly over the split, the same every time; each process takes its share."""
        n = meta[f'{split}_tokens']
        count = max(1, min(eval_iters, (n - 1) // block_size // batch_size))
        starts = np.linspace(0, n - block_size - 1, count * batch_size).astype(np.int64).reshape(count, batch_size)
        fast.eval()
        with autocast, enough_memory(batch_size, gradient_accumulation_steps):
            losses = [fast(*get_windows(bins[split], meta['dtype'], starts[i % count], block_size, device))[1]
                      for i in range(rank, math.ceil(count / world) * world, world)]  # as many for each: FSDP waits
        fast.train()
        total = torch.stack(losses).cpu().double()[:len(range(rank, count, world))].sum()
        if ddp:
            dist.all_reduce(total)
        return total.item() / count

    def show_sample():
        """What the model writes by now, from the end of a text or a newline on."""
        if rank > 0:
            return
        tok = get_tokenizer(meta['tokenizer'])
        start = torch.tensor([[tok.eot or 0]], device=device)
        raw_model.eval()
        with torch.compiler.set_stance('force_eager'):  # nothing is compiled for so little
            ids = [token.item() for token in raw_model.generate(start, 200, 0.8, 200, None, tok.n_vocab)]
        say('| ' + tok.decode_bytes(ids).decode('utf-8', 'replace').replace('\n', '\n| '))
        raw_model.train()

    # model
    torch.manual_seed(seed)
    iter_num, best_val_loss, checkpoint = 0, math.inf, {}
    newest, torchrun_id = os.path.join(out_dir, 'ckpt.pt'), os.environ.get('TORCHELASTIC_RUN_ID', '')
    if torchrun_id == 'none':  # its own name for a run on one machine, whose agent started this process
        torchrun_id = f'none-{os.getppid()}'
    if ddp:  # has torchrun started us again? One process decides: on several machines each has a count of its own
        count, machines = (int(os.environ.get(k, 0)) for k in ('TORCHELASTIC_RESTART_COUNT', 'GROUP_WORLD_SIZE'))
        if rank == 0 and torchrun_id and (count > 0 or machines > 1) and os.path.exists(newest):
            with contextlib.suppress(UserError):  # something else, that cannot be read, is not our checkpoint
                if load_checkpoint(newest).get('torchrun_id') == torchrun_id:
                    init_from = 'resume'
        choice = [init_from]
        dist.broadcast_object_list(choice)
        init_from = choice[0]
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, rope=rope,
                 qk_norm=qk_norm, relu2=relu2)
    if init_from == 'scratch':
        padded = math.ceil(meta['vocab_size'] / 64) * 64  # a multiple of 64 is what matrix units like
        raw_model = GPT(GPTConfig(**shape, vocab_size=padded, dropout=dropout))
    else:
        path = newest if init_from == 'resume' else init_from
        if init_from == 'resume' and not os.path.exists(path):
            raise UserError(f'there is no {path} to resume: check out_dir, or leave init_from=resume out')
        checkpoint = load_checkpoint(path, *(('optimizer', 'scaler') if init_from == 'resume' else ()),
                                     data=os.path.join(DATA, dataset))
        there = checkpoint['model_args']
        if checkpoint['tokenizer'] != meta['tokenizer']:
            raise UserError(f"{path} has another tokenizer ({checkpoint['tokenizer']['type']}, {there['vocab_size']} "
                            f"ids) than dataset={dataset} ({meta['tokenizer']['type']}, {meta['vocab_size']} ids): "
                            'use the dataset that it was trained on, prepared as it was then')
        if block_size > there['block_size'] or init_from == 'resume' and block_size < there['block_size']:
            raise UserError(f"block_size={block_size}, but {path} has {there['block_size']} positions: use "
                            f"--block_size={there['block_size']}, or fewer with --init_from={path}")
        kept = {k: there[k] for k in shape if k in there and k != 'block_size' and there[k] != shape[k]}
        config.update(kept)  # the weights decide
        if kept:
            say(f'{path} decides: ' + ', '.join(f'{k}={v}' for k, v in kept.items()))
        raw_model = GPT.from_checkpoint(checkpoint, dropout=dropout)
        raw_model.crop_block_size(block_size)
    raw_model.recompute = activation_checkpointing

    # raw_model owns the weights and is saved, fast is perhaps compiled and is evaluated, model is trained
    flops_per_step = raw_model.flops_per_token() * tokens_per_step
    if config['compile'] == 'auto' and device_type == 'cpu':  # it takes 20 s and saves a seventh of 10 minutes or more
        compile = flops_per_step * max_iters / world > 1e14
    fsdp = ddp and parallel == 'fsdp'
    if fsdp and sample_interval:
        raise UserError("sample_interval: with parallel='fsdp' no process has a whole model to write with: use 0")
    fast = compiled(raw_model, device_type == 'cpu' or fsdp) if compile else raw_model
    fast = shard(fast, device_type, dtype) if fsdp else fast.to(device)

    def wrap(fast):
        device_ids = [device] if device_type == 'cuda' else None
        return DDP(fast, device_ids, gradient_as_bucket_view=True) if ddp and not fsdp else fast

    model = wrap(fast)
    if compile:
        say('compiling the model (compile=False goes without)')
        with enough_memory(batch_size, gradient_accumulation_steps):
            problem = compile_problem(model, batches(iter_num)[0], autocast)
        if problem and (config['compile'] is True or fsdp):  # FSDP was left in the middle of a step
            raise UserError(f'{problem}: mend that, or --compile=False')
        if problem:
            say(f'{problem}: going on without it')
            torch.compiler.set_stance('force_eager')
            model = wrap(fast)  # a reducer that was left in the middle of a step is of no use

    optimizers = raw_model.configure_optimizers(optimizer, weight_decay, learning_rate, (beta1, beta2))
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    if init_from == 'resume':
        iter_num, best_val_loss = checkpoint['iter_num'], checkpoint['best_val_loss']
        # the moments of that run, with the settings that this one was given
        if checkpoint['optimizer'].keys() != optimizers.keys():
            theirs = list(checkpoint['optimizer'])[-1]
            raise UserError(f'optimizer={optimizer!r}, but {path} was trained with {theirs}: use --optimizer={theirs}, '
                            f'or start anew from its weights with --init_from={path}')
        for name, opt in optimizers.items():
            owners = [p for group in opt.param_groups for p in group['params']]
            state = {i: {key: shard_like(owners[i], value) for key, value in of_one.items()}
                     for i, of_one in checkpoint['optimizer'][name]['state'].items()}
            opt.load_state_dict(opt.state_dict() | dict(state=state))
        if checkpoint['scaler']:
            scaler.load_state_dict(checkpoint['scaler'])
        changed = [f'{k} {v} -> {config[k]}' for k, v in checkpoint['config'].items()
                   if k in config and config[k] != v and k != 'init_from']
        say(f'resuming {path} at step {iter_num}' + (f"; settings changed: {', '.join(changed)}" if changed else ''))
        if iter_num >= max_iters and not eval_only:
            say(f'max_iters={max_iters} are done already: to go on, raise max_iters and lr_decay_iters')
    wandb_id = checkpoint.get('wandb_id') if init_from == 'resume' else None
    checkpoint = None  # free its memory
    peak = peak_flops(device, dtype)
    say(f'{raw_model.num_params():,} parameters on {device} in {dtype}, {world} process{"es" * (world > 1)}, '
        f'{tokens_per_step:,} tokens a step, {meta["train_tokens"] / tokens_per_step:,.1f} steps an epoch')

    # output
    if rank == 0 and not eval_only:
        if wandb_log:
            wandb = optional('wandb', 'wandb_log=True')
            wandb_id = wandb.init(project=wandb_project, name=wandb_run_name, config=config, id=wandb_id,
                                  resume='allow').id
        if tensorboard_log:
            optional('tensorboard', 'tensorboard_log=True')  # torch's writer needs it
            tensorboard = optional('torch.utils.tensorboard', 'tensorboard_log=True').SummaryWriter(
                out_dir, purge_step=iter_num)
        log_path = os.path.join(out_dir, 'log.jsonl')
        try:
            os.makedirs(out_dir, exist_ok=True)
            if init_from != 'resume':
                set_aside(out_dir)
            cut_log(log_path, iter_num)
            log_file = open(log_path, 'ab', buffering=0)
        except OSError as error:
            raise UserError(f'out_dir={out_dir!r} cannot be written to ({error}): choose another') from None

    def log(**values):
        if rank == 0 and not eval_only:
            try:
                log_file.write((json.dumps(dict(iter=iter_num, **values)) + '\n').encode())
            except OSError as error:  # the disk is full, say: no reason to stop
                say(f'warning: {log_path}: {error}')
            if wandb_log:
                wandb.log(values, step=iter_num)
            if tensorboard_log:
                for key, value in values.items():
                    tensorboard.add_scalar(key, value, iter_num)

    def gather(value):
        value = whole(value)
        if rank == 0:
            return value.cpu() if torch.is_tensor(value) else value

    def save_as(name, best_val_loss, **state):
        """Returns what went wrong, or '', in every process."""
        problem, state = [''], state | dict(model=raw_model.state_dict())
        if fsdp:
            state = tree_map(gather, state)
            state['model']['lm_head.weight'] = state['model']['transformer.wte.weight']  # one tensor again, saved once
        if rank == 0:
            if not math.isfinite(sum(w.abs().max().item() for w in state['model'].values())):
                raise UserError(f'a weight is not finite at step {iter_num}: nothing was saved. {advice}')
            problem = [save(state | dict(model_args=vars(raw_model.config), iter_num=iter_num, config=config,
                                         best_val_loss=best_val_loss, tokenizer=meta['tokenizer'], wandb_id=wandb_id,
                                         torchrun_id=torchrun_id), os.path.join(out_dir, name))]
        if ddp:
            dist.broadcast_object_list(problem)
        if problem[0]:
            say(f'warning: {problem[0]}: make room; going on, to try again at the next save')
        return problem[0]

    def save_all():
        return save_as('ckpt.pt', best_val_loss, scaler=scaler.state_dict(),
                       optimizer={name: opt.state_dict() for name, opt in optimizers.items()})

    advice = (f'Go on from the last checkpoint with --init_from=resume and a learning_rate below {learning_rate}, or '
              'grad_clip=1 if it is 0')
    signals = []  # SIGINT or SIGTERM, waiting for the end of a step

    def on_signal(number, frame):
        signals.append(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends the process at once; SIGTERM comes twice from some clusters
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM) if not eval_only else ():
        signal.signal(number, on_signal)

    # training
    model.train()
    stop = 0
    gc.freeze()  # no looking through all that is there, again and again, for garbage
    ready = batches(iter_num)
    since, logged_iter, saved_at, skipped, unsaved = time.time(), iter_num, time.time(), 0, ''
    while True:
        if iter_num % eval_interval == 0 or iter_num >= max_iters or eval_only:
            losses = {split: eval_loss(split) for split in ('train', 'val')}
            say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
            log(train_loss=losses['train'], val_loss=losses['val'])
            if eval_only:
                break
            if not math.isfinite(losses['val']):
                raise UserError(f"the val loss is {losses['val']} at step {iter_num}: nothing was saved. {advice}")
            if sample_interval and iter_num % sample_interval == 0:
                show_sample()
            better = losses['val'] < best_val_loss
            if better and not save_as('best.pt', losses['val']):
                best_val_loss = losses['val']
            if better or always_save_checkpoint or iter_num >= max_iters:
                unsaved = save_all()  # at step 0 too: a disk that is too small shows before anything is lost
            since, logged_iter, saved_at = time.time(), iter_num, time.time()
        if iter_num >= max_iters:
            break

        lr = learning_rate
        if decay_lr:
            lr = get_lr(iter_num, learning_rate, warmup_iters, lr_hold_iters, lr_decay_iters, min_lr, lr_schedule)
        for opt in optimizers.values():
            for group in opt.param_groups:
                group['lr'] = lr
        if dropout:  # what is dropped in a step depends on the step alone, so a resumed run goes on as if never stopped
            torch.manual_seed(int(np.random.SeedSequence((seed, iter_num, rank)).generate_state(1)[0]))
        with enough_memory(batch_size, gradient_accumulation_steps):
            loss, norm = backward(model, optimizers, scaler, ready, grad_clip, autocast)
            ready = batches(iter_num + 1)  # while a GPU is still busy with this step
            norm = update(model, optimizers, scaler, norm)

        skipped = 0 if math.isfinite(norm) else skipped + 1
        if skipped:
            say(f'iter {iter_num}: skipped, for the norm of its gradient is {norm}, {skipped} in a row')
            log(skipped=skipped)
            if skipped >= max_skipped:
                raise UserError(f'{skipped} steps in a row had no finite gradient (max_skipped={max_skipped}), the '
                                f'last checkpoint is as it was. {advice}')
        elif iter_num % log_interval == 0:
            loss = loss.cpu() / world  # waits for the device; the mean over all processes' micro-batches
            if ddp:
                dist.all_reduce(loss)
            loss, now = loss.item(), time.time()
            seconds = (now - since) / (iter_num + 1 - logged_iter)
            since, logged_iter = now, iter_num + 1
            rate = tokens_per_step / seconds
            mfu = f', mfu {flops_per_step / seconds / (peak * world):.2%}' if peak else ''
            eta = datetime.timedelta(seconds=min(10**9, round(seconds * (max_iters - iter_num - 1))))
            say(f'iter {iter_num}: loss {loss:.4f}, time {seconds * 1000:.2f}ms{mfu}, lr {lr:.2e}, norm {norm:.2f}, '
                f'{rate:,.0f} tok/s, eta {eta}', passing=True)
            log(loss=loss, lr=lr, grad_norm=norm, time_ms=seconds * 1000, tokens_per_second=rate)
        iter_num += 1

        due = 0 < save_interval * 60 < time.time() - saved_at
        flags = torch.tensor([signals[0] if signals else 0, int(due)])
        if ddp:  # one was told to stop: all stop, at the same step
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop, due = flags.tolist()
        if stop or due:
            unsaved, saved_at = save_all(), time.time()
        if stop:
            command = shlex.join([a for a in sys.argv if not a.startswith('--init_from=')] + ['--init_from=resume'])
            say(f'stopped by {signal.Signals(stop).name} at step {iter_num}'
                + ('' if unsaved else f", saved {newest}. Go on with\n{'torchrun ...' if ddp else 'python'} {command}"))
            break

    if iter_num >= max_iters and best_val_loss < math.inf and not eval_only:
        say(f'best val loss {best_val_loss:.4f}, its weights in {out_dir}/best.pt. See what it writes with\n'
            f'python {shlex.join([sys.argv[0].replace("train.py", "sample.py"), f"--out_dir={out_dir}"])}')
    if rank == 0 and not eval_only:
        log_file.close()
        if tensorboard_log:
            tensorboard.close()
        if wandb_log:
            wandb.finish()
    if unsaved:
        print(f'error: the end of this run is lost: {unsaved}', file=sys.stderr, flush=True)
    code = 2 if unsaved else 128 + stop if stop else 0
    if ddp:
        leave(code)
    sys.exit(code)
