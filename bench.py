"""
Measure a model or this machine.

$ python bench.py --task=train                                    # a training step of GPT-2 124M
$ python bench.py --task=train --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64
$ python bench.py --task=hellaswag --init_from=gpt2               # how often it picks the sensible ending of four
$ python bench.py --task=loss --init_from=gpt2 --source=book.txt --stride=512   # perplexity and bits per byte

Under torchrun, hellaswag and loss are shared among the GPUs.
"""
import itertools
import json
import math
import os
import statistics
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configurator import UserError, check, configure, resolve
from model import GPT, GPTConfig, load_checkpoint
from prepare import DATA, Progress, download, get_tokenizer, load_dataset, locate, read
from train import autocast_for, compile_problem, peak_flops, train_step

task = 'train'     # what to measure: train, the time of a training step on random tokens; hellaswag; loss
init_from = ''     # the model: out-mine, x/ckpt.pt, gpt2, gpt2-xl, ...; '': a random one, of this shape
source = ''        # hellaswag: its file, if not to be downloaded; loss: a text, or the val.bin of a dataset
stride = 0         # loss: a window begins so many tokens after the last; 0: half of its length
batch_size = 8     # windows, or HellaSwag's items, in a step
block_size = 1024  # tokens in a window
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
dropout = 0.0
bias = False
rope = False
qk_norm = False
relu2 = False
warmup = 3         # steps before the clock starts
steps = 5          # steps in a measurement
repeats = 5        # measurements: their median counts
seed = 1337
device = 'auto'    # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
dtype = 'auto'     # of the arithmetic: 'float32', 'bfloat16', 'float16'; auto: float32, to train what the device likes
compile = 'auto'   # torch.compile: True, False; auto: on CUDA

HELLASWAG = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
PUBLISHED = 'gpt2 0.2945, gpt2-medium 0.3752, gpt2-large 0.4320, gpt2-xl 0.4889'  # acc_norm, measured in this way


def peak_memory(device_type):
    """The most memory that was in use, in bytes: the GPU's, or this process's."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated()
    if device_type == 'mps':
        return torch.mps.driver_allocated_memory()
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def measure(step, warmup, steps, repeats, device_type):
    """Seconds that one step takes, of each of the repeated measurements."""
    synchronize, seconds = getattr(torch, device_type).synchronize, []
    for _ in range(warmup):
        step()
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        seconds.append((time.perf_counter() - begin) / steps)
    return seconds


def training(model, batch_size, block_size, warmup, steps, repeats, device, dtype, compile):
    """What a training step on random tokens takes."""
    device_type, autocast = device.partition(':')[0], autocast_for(device, dtype)
    batch = torch.randint(model.config.vocab_size, (2, batch_size, block_size), device=device)
    optimizer = model.configure_optimizer(0.1, 6e-4, (0.9, 0.95))
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    fast = torch.compile(model) if compile else model
    if compile and (problem := compile_problem(fast, batch, autocast)):
        raise UserError(f'{problem}: measure with --compile=False')
    seconds = measure(lambda: train_step(fast, optimizer, scaler, [batch], 1.0, autocast), warmup, steps, repeats,
                      device_type)

    median, tokens = statistics.median(seconds), batch_size * block_size
    rate, peak = model.flops_per_token() * tokens / median, peak_flops(device, dtype)
    name = f'{device}, {torch.get_num_threads()} threads'
    if device_type == 'cuda':
        name = torch.cuda.get_device_name(device)
    print(f'{model.num_params():,} parameters, {batch_size} x {block_size} tokens, {dtype}, '
          f'compile={compile}, torch {torch.__version__}, {name}')
    print(f'step    {median * 1000:,.2f} ms: median of {repeats} x {steps} steps after {warmup} '
          f'({min(seconds) * 1000:,.2f} to {max(seconds) * 1000:,.2f})')
    print(f'tokens  {tokens / median:,.0f}/s')
    mfu = f', {rate / peak:.1%} of the {peak / 1e12:,.0f} T/s that this device can do' if peak else ''
    print(f'FLOPs   {rate / 1e9:,.0f} G/s{mfu}')
    print(f'memory  {peak_memory(device_type) / 2**30:.2f} GiB at most')
    return dict(step_ms=median * 1000, tokens_per_second=tokens / median, flops=rate, memory=peak_memory(device_type),
                device=name)


def read_hellaswag(path, tok, block_size):
    """Its items as [(ids of the context, ids of each ending, number of the right one)], the shortest contexts first."""
    items = []
    with open(path, encoding='utf-8') as f:
        for number, line in enumerate(f, 1):
            try:
                item = json.loads(line)
                context, endings, label = item['ctx'], item['endings'], item['label']
                items.append((tok.encode(context).tolist(), [tok.encode(f' {e}').tolist() for e in endings], label))
                if label not in range(len(endings)) or not items[-1][0]:
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f'{path}, line {number}: not an item with a ctx, endings and a label') from None
    room = block_size + 1 - max(len(ids) for _, endings, _ in items for ids in endings)
    if room < 1:
        raise UserError(f'block_size={block_size}: HellaSwag has endings of {block_size + 1 - room} tokens')
    return sorted(((context[-room:], endings, label) for context, endings, label in items), key=lambda i: len(i[0]))


@torch.no_grad()
def ending_losses(model, contexts, endings, device):
    """-log p of all tokens of each ending, summed: (items, endings). Contexts of one length go through the model once,
    then every ending beside the others on the keys and values that they have left."""
    width, longest = len(contexts[0]), max(len(ids) for item in endings for ids in item)
    cache = model.empty_cache(len(contexts), width - 1 + longest)
    if width > 1:  # the context's last token predicts an ending's first, so it goes with the endings
        model.hidden(torch.tensor(contexts, device=device)[:, :-1], cache)
    cache = [layer.repeat_interleave(len(endings[0]), dim=1) for layer in cache]
    rows = [[context[-1], *ids] + [-1] * (longest - len(ids))
            for context, item in zip(contexts, endings, strict=True) for ids in item]
    rows = torch.tensor(rows, device=device)
    logits = model.lm_head(model.hidden(rows[:, :-1].clamp(min=0), cache, width - 1))
    losses = F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], ignore_index=-1, reduction='none')
    return losses.sum(dim=1).view(len(contexts), -1).cpu()


def hellaswag(model, items, batch_size, device, rank, world):
    """How often the right ending has the least loss in all (acc), and the least loss a token (acc_norm)."""
    alike = [list(group) for _, group in itertools.groupby(items, lambda item: (len(item[0]), len(item[1])))]
    batches = [group[i:i + batch_size] for group in alike for i in range(0, len(group), batch_size)][rank::world]
    counts, progress = torch.zeros(3), Progress('hellaswag', len(items) / world, 'items')
    for batch in batches:
        contexts, endings, labels = zip(*batch, strict=True)
        losses, right = ending_losses(model, contexts, endings, device), torch.tensor(labels)
        lengths = torch.tensor([[len(ids) for ids in item] for item in endings])
        counts += torch.tensor([len(batch), *((x.argmin(1) == right).sum() for x in (losses, losses / lengths))])
        progress(counts[0].item())
    n, *right = sum_up(counts, world)
    acc, acc_norm = (count / n for count in right)
    acc_stderr, acc_norm_stderr = (math.sqrt(p * (1 - p) / max(1, n - 1)) for p in (acc, acc_norm))
    if rank == 0:
        print(f'acc       {acc:.4f} +- {acc_stderr:.4f}, by the whole loss of an ending, {n:,.0f} items')
        print(f'acc_norm  {acc_norm:.4f} +- {acc_norm_stderr:.4f}, by its loss a token')
        print(f'published acc_norm, of 10,042 items: {PUBLISHED}')
    return dict(items=int(n), acc=acc, acc_stderr=acc_stderr, acc_norm=acc_norm, acc_norm_stderr=acc_norm_stderr)


@torch.no_grad()
def text_loss(model, ids, n_bytes, stride, batch_size, device, rank, world):
    """The mean of -log p of every token but the first. Windows begin stride tokens apart, and each counts for what the
    one before has not reached: at half a window every token has at least half a window before it."""
    size = min(model.config.block_size, len(ids) - 1)
    begins = [*range(0, len(ids) - 1 - size, stride), len(ids) - 1 - size]
    total, progress = torch.zeros(2, dtype=torch.float64), Progress('loss', len(begins) / world, 'windows')
    for first in range(rank * batch_size, len(begins), world * batch_size):
        some = range(first, min(first + batch_size, len(begins)))
        rows = torch.from_numpy(np.stack([ids[begins[i]:begins[i] + size + 1] for i in some]).astype(np.int64))
        targets = rows[:, 1:].clone()
        for i in some:
            targets[i - first, :begins[i - 1] + size - begins[i] if i else 0] = -1
        n = (targets >= 0).sum().item()
        total += torch.tensor([model(rows[:, :-1].to(device), targets.to(device))[1].item() * n, n])
        progress(first / world)
    loss, n = sum_up(total, world)
    result = dict(tokens=int(n), loss=loss / n, perplexity=math.exp(loss / n),
                  bits_per_byte=loss / math.log(2) / n_bytes)
    if rank == 0:
        print(f'loss           {loss / n:.4f} a token, {n:,.0f} tokens in windows of {size}, {stride} apart')
        print(f"perplexity     {result['perplexity']:.3f}")
        print(f"bits per byte  {result['bits_per_byte']:.4f}, {n_bytes:,} bytes")
    return result


def read_text(source, tok, tokenizer):
    """The ids of a text, documents apart, or of a val.bin in the same tokens; and how many bytes follow the first."""
    if source.endswith('.bin'):
        meta, _ = load_dataset(os.path.dirname(os.path.abspath(source)))
        if meta['tokenizer'] != tokenizer:
            raise UserError(f"{source} is in the tokens of another tokenizer ({meta['tokenizer']['type']}) than the "
                            f"model's ({tokenizer['type']}): give the text itself")
        ids = np.fromfile(source, meta['dtype'])
    else:
        parts, separator = [], [] if tok.eot is None else [tok.eot]
        for text, ends in read(locate(source, DATA, {}, 0), 'tokens'):
            parts += [tok.encode(text), separator * ends]
        ids = np.concatenate([[], *parts[:-1]]).astype(np.uint16)
    if len(ids) < 2:
        raise UserError(f'{source} has {len(ids)} tokens: there is nothing to predict')
    return ids, len(tok.decode_bytes(ids[1:][ids[1:] != tok.eot]))


def sum_up(counts, world):
    """The sum over all processes."""
    if world > 1:
        dist.all_reduce(counts)
    return counts.tolist()


if __name__ == '__main__':
    settings = configure(globals())
    if task != 'train' and dtype == 'auto':
        dtype = 'float32'
    device, dtype, compile = resolve(device, dtype, compile)
    check(settings, "task in ('train', 'hellaswag', 'loss')", 'batch_size > 0', 'warmup >= 0', 'steps > 0',
          'repeats > 0', 'seed >= 0', 'stride >= 0')
    if task != 'train' and not init_from:
        raise UserError(f'task={task} needs a trained model: --init_from=gpt2, or the folder of a run')
    if task == 'loss' and not source:
        raise UserError('task=loss needs a text: --source=FILE')
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:
        dist.init_process_group('gloo')
    torch.manual_seed(seed)
    if rank > 0:
        dist.barrier()  # the first process downloads what the others then find
    if init_from:
        checkpoint = load_checkpoint(init_from)
        model = GPT.from_checkpoint(checkpoint, dropout=dropout)
    else:
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, rope, qk_norm, relu2))
    if task != 'train':
        model.to(getattr(torch, dtype)).eval()
        tok = get_tokenizer(checkpoint['tokenizer'])
    if task == 'hellaswag':
        path = source or os.path.join(DATA, 'hellaswag', os.path.basename(HELLASWAG))
        if not source and not os.path.exists(path):
            download({path: HELLASWAG})
        items = read_hellaswag(path, tok, model.config.block_size)
    if task == 'loss':
        ids, n_bytes = read_text(source, tok, checkpoint['tokenizer'])
    if rank == 0 and world > 1:
        dist.barrier()

    model.to(device)
    if task == 'train':
        result = training(model, batch_size, min(block_size, model.config.block_size), warmup, steps, repeats, device,
                          dtype, compile)
    elif task == 'hellaswag':
        result = hellaswag(model, items, batch_size, device, rank, world)
    else:
        stride = stride or max(1, model.config.block_size // 2)
        result = text_loss(model, ids, n_bytes, stride, batch_size, device, rank, world)
    if rank == 0:
        print(json.dumps(dict(task=task, model=init_from, dtype=dtype, **result)))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
