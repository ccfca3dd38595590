"""
Measure a model, or this machine with it.

$ python bench.py --task=train                                    # a training step of GPT-2 124M
$ python bench.py --task=train --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64
$ python bench.py --task=generate --init_from=gpt2                # time to the first token, and rate of the others
$ python bench.py --task=prepare                                  # tokenizers
$ python bench.py --task=generate --vs=../nanoGPT                 # and the same with another code, in turn
$ python bench.py --task=hellaswag --init_from=gpt2               # how often it picks the sensible ending of four
$ python bench.py --task=loss --init_from=gpt2 --source=book.txt --stride=512   # perplexity and bits per byte
$ python bench.py --task=curves --runs=out-a,out-b --plot=curves.png            # their losses by step, tokens and time

The last line is the result as JSON. Under torchrun, train measures DDP; hellaswag and loss are shared among the GPUs.
"""
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import UserError, check, configure, keep_memory, optional, resolve
from model import GPT, GPTConfig, load_checkpoint
from prepare import DATA, SHAKESPEARE, Progress, download, get_tokenizer, load_dataset, locate, prepare, read
from train import autocast_for, backward, compile_problem, compiled, peak_flops, update

task = 'train'     # train: a training step; generate; prepare: tokenizing; hellaswag, loss: how good a model is; curves
vs = ''            # measure a checkout of nanoGPT in this folder too, or for generate 'transformers', and the ratio
init_from = ''     # the model: out-mine, x/ckpt.pt, gpt2, gpt2-xl, ...; '': a random one, of this shape
source = ''        # hellaswag: its file, if not to be downloaded; loss: a text, or the val.bin of a dataset
runs = ''          # curves: the folders of runs, with commas between
plot = ''          # curves: the picture to draw (needs matplotlib); '': with characters, here
stride = 0         # loss: a window begins so many tokens after the last; 0: half of its length
prompt = 32        # generate: tokens to begin with
new_tokens = 128   # generate: tokens to write
megabytes = 32     # prepare: of text
tokenizer = ''     # prepare: 'char', 'gpt2' or 'bpe', which nanoGPT has not; '': all of them
batch_size = 0     # windows in a step, texts written side by side, or HellaSwag's items; 0: 8, for generate 1
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
optimizer = 'adamw'  # train: or 'muon'
warmup = 3         # train: steps before the clock starts
steps = 5          # train: steps in a measurement
repeats = 5        # measurements: their median counts
profile = False    # train, generate: where the time goes, as a table, and as a trace in trace.json
seed = 1337
device = 'auto'    # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
dtype = 'auto'     # 'float32', 'bfloat16', 'float16'; auto: what the device is good at, hellaswag and loss: float32
compile = 'auto'   # torch.compile: True, False; auto: on CUDA, and to generate on a CPU
quantize = ''      # generate, loss, hellaswag: 'int8' weights
rival = ''         # what --vs gives to its own processes

HELLASWAG = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'
COMPARED = ('tokens_per_second', 'memory', 'char', 'gpt2')  # with --vs
PUBLISHED = 'gpt2 0.2945, gpt2-medium 0.3752, gpt2-large 0.4320, gpt2-xl 0.4889'  # acc_norm, measured in this way


def peak_memory(device_type):
    """The most memory that was in use, in bytes: the GPU's, or this process's."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated()
    if device_type == 'mps':
        return torch.mps.driver_allocated_memory()
    if os.path.exists('/proc/self/status'):  # what getrusage says includes the process that started this one
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) for line in f if line.startswith('VmHWM')) * 1024
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def seconds_of(work, repeats, device_type):
    """How long work took, each time."""
    synchronize, seconds = getattr(torch, device_type).synchronize, []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def matmul_rate(device, dtype):
    """Floating point operations a second in products of large matrices: the most that this machine does."""
    n = 2048 if device == 'cpu' else 8192
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    return 2 * n ** 3 / min(seconds_of(lambda: a @ a, 8, device.partition(':')[0]))


def read_rate(device):
    """Bytes a second that it reads from memory: of a sum and of dot products, the faster."""
    x = torch.ones(2 ** 27, device=device)
    ways = (x.sum, lambda: torch.bmm(x.view(8, 1, -1)[:, :, :4096], x.view(8, -1, 4096).transpose(1, 2)))
    return x.nbytes / min(s for way in ways for s in seconds_of(way, 8, device.partition(':')[0]))


def show_profile(work):
    """Where the time goes, by operation."""
    with torch.profiler.profile() as profiler:
        work()
    order = 'self_cpu_time_total' if not torch.cuda.is_available() else 'self_device_time_total'
    print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    profiler.export_chrome_trace('trace.json')
    print('trace.json shows it over time, in chrome://tracing or ui.perfetto.dev')


def name_of(device):
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    return f'{device}, {torch.get_num_threads()} threads'


def their_model(folder, config):
    """nanoGPT's model of the same shape."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(folder, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        names = {field.name for field in dataclasses.fields(module.GPTConfig)}
    except (OSError, AttributeError) as error:
        raise UserError(f'vs={folder}: there is no nanoGPT in it ({error})') from None
    with contextlib.redirect_stdout(io.StringIO()):
        return module.GPT(module.GPTConfig(**{k: v for k, v in vars(config).items() if k in names}))


def training(model, rival, batch_size, block_size, optimizer, warmup, steps, repeats, device, dtype, compile, world):
    """What a training step on random tokens takes."""
    device_type = device.partition(':')[0]
    flops, vocab_size = model.flops_per_token(), model.config.vocab_size
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    if rival:
        model = their_model(rival, model.config).to(device)
        dtype = dtype if device_type == 'cuda' else 'float32'  # all that its train.py does elsewhere
        with contextlib.redirect_stdout(io.StringIO()):
            optimizers = dict(adamw=model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device_type))
        fast = torch.compile(model) if compile else model
    else:
        optimizers = model.configure_optimizers(optimizer, 0.1, 6e-4, (0.9, 0.95))
        fast = compiled(model, device == 'cpu') if compile else model
    if world > 1:
        fast = DDP(fast, [device] if device_type == 'cuda' else None, gradient_as_bucket_view=True)
    batch, autocast = torch.randint(vocab_size, (2, batch_size, block_size), device=device), autocast_for(device, dtype)
    if compile and (problem := compile_problem(fast, batch, autocast)):
        raise UserError(f'{problem}: measure with --compile=False')

    def work(count=steps):
        for _ in range(count):
            update(fast, optimizers, scaler, backward(fast, optimizers, scaler, [batch], 1.0, autocast)[1])
    work(warmup)
    seconds = [s / steps for s in seconds_of(work, repeats, device_type)]
    memory, median, tokens = peak_memory(device_type), statistics.median(seconds), batch_size * block_size * world
    rate, ceiling = flops * tokens / median, (peak_flops(device, dtype) or matmul_rate(device, dtype)) * world
    return work, [
        f'{batch_size} x {block_size} tokens, {world} processes, {dtype}, compile={compile}',
        f'step    {median * 1000:,.2f} ms: median of {repeats} x {steps} steps after {warmup} '
        f'({min(seconds) * 1000:,.2f} to {max(seconds) * 1000:,.2f})',
        f'tokens  {tokens / median:,.0f}/s',
        f'FLOPs   {rate / 1e9:,.0f} G/s, {rate / ceiling:.1%} of '
        f'{"its data sheet" if peak_flops(device, dtype) else "what large products reach here"}',
        f'memory  {memory / 2**30:.2f} GiB at most'], dict(
        seconds=median, step_ms=median * 1000, tokens_per_second=tokens / median, flops=rate, of_peak=rate / ceiling,
        memory=memory, processes=world)


def generating(model, rival, batch_size, prompt, new_tokens, repeats, device, dtype, compile):
    """What it takes to write: the first token with the reading of the prompt, and the rate of those after it."""
    device_type, config = device.partition(':')[0], model.config
    idx = torch.randint(min(config.vocab_size, 50257), (batch_size, prompt), device=device)
    if rival == 'transformers':
        hf = optional('transformers', 'vs=transformers')
        model = hf.GPT2LMHeadModel(hf.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, bos_token_id=0, eos_token_id=0))
    elif rival:
        model = their_model(rival, config)
    if rival:
        model.to(device, getattr(torch, dtype)).eval()
    weights = sum(p.nbytes for name, p in model.named_parameters() if '.wpe' not in name)
    if not rival and model.lm_head.weight is not model.transformer.wte.weight:
        weights -= model.transformer.wte.weight.nbytes  # of which only a row is read
    first, rest = [], []

    def work():
        begin = time.perf_counter()
        if rival == 'transformers':
            model.generate(idx, attention_mask=torch.ones_like(idx), min_new_tokens=new_tokens, do_sample=True,
                           max_new_tokens=new_tokens, top_k=200, temperature=0.8, pad_token_id=0)
        elif rival:
            model.generate(idx, new_tokens, temperature=0.8, top_k=200)
        else:
            tokens = model.generate(idx, new_tokens, temperature=0.8, top_k=200, compile=compile)
            next(tokens).tolist()
            first.append(time.perf_counter() - begin)
            for token in tokens:
                token.tolist()
            rest.append(time.perf_counter() - begin - first[-1])
    work()
    first.clear()
    rest.clear()
    seconds = seconds_of(work, repeats, device_type)
    median, total, bandwidth = statistics.median(seconds), new_tokens * batch_size, read_rate(device)
    lines = [f'{batch_size} x {new_tokens} tokens after {prompt}, {dtype}, compile={compile}',
             f'in all         {total / median:,.1f} tokens/s: median of {repeats} '
             f'({total / max(seconds):,.1f} to {total / min(seconds):,.1f})']
    result = dict(seconds=median, tokens_per_second=total / median, weights=weights, read_rate=bandwidth)
    if not rival and new_tokens > 1:
        ttft, step = statistics.median(first), statistics.median(rest) / (new_tokens - 1)
        lines += [f'first token    {ttft * 1000:,.1f} ms',
                  f'the others     {batch_size / step:,.1f} tokens/s, {step * 1000:,.2f} ms a step',
                  f'memory         {weights / step / 1e9:,.1f} GB/s of weights, {weights / step / bandwidth:.1%} of '
                  f'what this machine reads ({bandwidth / 1e9:,.1f} GB/s)']
        result |= dict(first_token_ms=ttft * 1000, decode_per_second=batch_size / step,
                       of_bandwidth=weights / step / bandwidth)
    return work, lines, result


def preparing(rival, megabytes, tokenizer, repeats):
    """How fast text becomes tokens, from file to files: the embedded text, again and again."""
    lines, result = [], {}
    with open(SHAKESPEARE, encoding='utf-8') as f, tempfile.TemporaryDirectory() as folder:
        text = f.read()
        text = (text * math.ceil(megabytes * 1e6 / len(text)))[:int(megabytes * 1e6)]
        path = os.path.join(folder, 'input.txt')
        with open(path, 'w', encoding='utf-8') as out:
            out.write(text)

        def tokenize(name):
            with contextlib.redirect_stdout(io.StringIO()):
                if rival:  # a script that reads the input.txt beside it
                    script = os.path.join('data', 'shakespeare_char' if name == 'char' else 'shakespeare', 'prepare.py')
                    runpy.run_path(shutil.copy(os.path.join(rival, script), folder))
                else:
                    prepare(os.path.join(folder, 'ours'), path, name)

        for name in [tokenizer] if tokenizer else ['char', 'gpt2'] if rival else ['char', 'gpt2', 'bpe']:
            seconds = seconds_of(lambda name=name: tokenize(name), repeats, 'cpu')
            median = statistics.median(seconds)
            lines.append(f'{name:5} {megabytes / median:,.1f} MB/s: median of {repeats} '
                         f'({megabytes / max(seconds):,.1f} to {megabytes / min(seconds):,.1f})')
            result[name] = megabytes / median
    return lines, result


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


def read_run(folder):
    """What log.jsonl says of a run: {'train': [(step, tokens, seconds, loss), ...], 'val': the same}."""
    curves, path = dict(train=[], val=[]), os.path.join(folder, 'log.jsonl')
    at = seconds = pace = per_step = 0  # steps and time up to the last entry; time and tokens of one step
    try:
        with open(path, encoding='utf-8') as f:
            for line in f:
                try:
                    entry = json.loads(line)
                except ValueError:  # half a line, as a kill or a full disk leaves it
                    continue
                if 'loss' in entry:
                    pace = entry['time_ms'] / 1000
                    per_step = round(pace * entry['tokens_per_second'])
                    seconds += (entry['iter'] + 1 - at) * pace
                    at = entry['iter'] + 1
                    curves['train'].append((at, at * per_step, seconds, entry['loss']))
                if 'val_loss' in entry and math.isfinite(entry['val_loss']):
                    step = entry['iter']
                    curves['val'].append((step, step * per_step, seconds + (step - at) * pace, entry['val_loss']))
    except FileNotFoundError:
        raise UserError(f'runs: there is no {path}') from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__}: {error})') from None
    if not curves['val']:
        raise UserError(f'{path} holds no evaluation yet')
    return curves


def draw(runs, plot):
    """The losses of runs {name: curves}, in a picture or with characters."""
    axes = ('steps', 'tokens', 'seconds')
    if plot:
        figure, plots = optional('matplotlib.pyplot', f'plot={plot}').subplots(1, 3, figsize=(15, 4.5), sharey=True)
        for number, (name, curves) in enumerate(runs.items()):
            for axis, (part, label) in enumerate(zip(plots, axes, strict=True)):
                for split, style in (('train', dict(alpha=0.3)), ('val', dict(marker='o', label=name))):
                    part.plot([p[axis] for p in curves[split]], [p[3] for p in curves[split]], f'C{number}', **style)
                part.set(xlabel=label, ylabel='loss (faint: train)' * (axis == 0))
        plots[0].legend()
        figure.tight_layout()
        figure.savefig(plot, dpi=100)
        print(f'{plot}: {", ".join(runs)}')
        return
    width, height, points = 72, 18, [p for curves in runs.values() for split in curves.values() for p in split]
    low, high = min(p[3] for p in points), max(p[3] for p in points)
    for axis, label in enumerate(axes):
        most, cells = max(p[axis] for p in points) or 1, [[' '] * width for _ in range(height)]
        for number, curves in enumerate(runs.values()):
            for split, mark in (('train', '.'), ('val', chr(97 + number % 26))):
                for p in curves[split] if split == 'val' or len(runs) == 1 else ():  # whose dots would these be?
                    row = round((high - p[3]) / max(high - low, 1e-9) * (height - 1))
                    cells[row][round(p[axis] / most * (width - 1))] = mark
        for row, line in enumerate(cells):
            print(f'{high - (high - low) * row / (height - 1):7.3f} |' + ''.join(line).rstrip())
        print(f'{"":8}+{"-" * width}\n{"":9}0{f"{most:,.0f} {label}":>{width - 1}}\n')
    marks = ', '.join(f'{chr(97 + number % 26)} {name}' for number, name in enumerate(runs))
    dots = '; train loss: dots' if len(runs) == 1 else ''
    print(f'val loss: {marks}{dots}. --plot=curves.png makes a picture of it (pip install matplotlib)')


def sum_up(counts, world):
    """The sum over all processes."""
    if world > 1:
        dist.all_reduce(counts)
    return counts.tolist()


def alternate(repeats, vs):
    """The same work in processes of its own, ours and the rival's in turn: medians, and their ratio."""
    results = {'': [], vs: []}
    for rival in list(results) * repeats:
        command = [sys.executable, __file__, *sys.argv[1:], '--vs=', '--repeats=1', f'--rival={rival}']
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f'vs={vs}: this failed: {" ".join(command)}')
        results[rival].append(json.loads(done.stdout.splitlines()[-1]))
        measured = {k: round(v, 1) for k, v in results[rival][-1].items() if k in COMPARED}
        print(f'{rival or "ours":24}', measured, flush=True)
    ours, theirs = ({k: statistics.median(r[k] for r in runs) for k in COMPARED if k in runs[0]}
                    for runs in results.values())
    for key in theirs:
        print(f'{key}: {ours[key]:,.1f} against {theirs[key]:,.1f}: {ours[key] / theirs[key]:.2f} times, '
              f'medians of {repeats}')
    return dict(ours=ours, theirs=theirs)


if __name__ == '__main__':
    settings = configure(globals())
    if task in ('hellaswag', 'loss') and dtype == 'auto':
        dtype = 'float32'
    device, dtype, compile = resolve(device, dtype, compile, width=n_embd if task == 'train' else 0)
    if settings['compile'] == 'auto' and task == 'generate':
        compile = device != 'mps'
    check(settings, "task in ('train', 'generate', 'prepare', 'hellaswag', 'loss', 'curves')", 'batch_size >= 0',
          'warmup >= 0', 'steps > 0', 'repeats > 0', 'seed >= 0', 'stride >= 0', 'prompt > 0', 'new_tokens > 0',
          'megabytes > 0', "optimizer in ('adamw', 'muon')", "quantize in ('', 'int8')",
          "tokenizer in ('', 'char', 'gpt2', 'bpe')")
    if quantize and task == 'train':
        raise UserError(f'quantize={quantize}: weights of 8 bits cannot be trained, leave it out')
    if task in ('hellaswag', 'loss') and not init_from:
        raise UserError(f'task={task} needs a trained model: --init_from=gpt2, or the folder of a run')
    if task == 'loss' and not source:
        raise UserError('task=loss needs a text: --source=FILE')
    if source and not re.match('https?://', source) and not os.path.exists(source):
        raise UserError(f'source={source!r}: no such file or folder')
    if task == 'curves':
        if not runs:
            raise UserError('task=curves needs the folders of runs: --runs=out-a,out-b')
        curves = {folder: read_run(folder) for folder in runs.split(',')}
        draw(curves, plot)
        print(json.dumps(dict(task=task, **{name: min(p[3] for p in run['val']) for name, run in curves.items()})))
        sys.exit()
    if vs:
        if task in ('hellaswag', 'loss'):
            raise UserError(f'vs={vs}: this is for the tasks train, generate and prepare')
        print(json.dumps(dict(task=task, vs=vs, **alternate(repeats, vs))))
        sys.exit()
    if not rival:
        keep_memory()
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    batch_size = batch_size or (1 if task == 'generate' else 8)
    if world > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
    torch.manual_seed(seed)
    if rank > 0:
        dist.barrier()  # the first process downloads what the others then find
    model, work = None, None
    if init_from:
        checkpoint = load_checkpoint(init_from)
        model = GPT.from_checkpoint(checkpoint, dropout=dropout)
    elif task != 'prepare':
        with torch.device('meta' if rival else 'cpu'):  # of ours only the shape matters then
            model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, rope, qk_norm, relu2))
    if task in ('hellaswag', 'loss'):
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
    n_params = f'{model.num_params():,} parameters, ' if model else ''
    if model and not rival:
        if quantize:
            model.quantize()
        model.to(device, torch.float32 if task == 'train' else getattr(torch, dtype)).train(task == 'train')

    if task == 'train':
        work, lines, result = training(model, rival, batch_size, min(block_size, model.config.block_size), optimizer,
                                       warmup, steps, repeats, device, dtype, compile, world)
    elif task == 'generate':
        work, lines, result = generating(model, rival, batch_size, prompt, new_tokens, repeats, device, dtype, compile)
    elif task == 'prepare':
        lines, result = preparing(rival, megabytes, tokenizer, repeats)
    elif task == 'hellaswag':
        lines, result = [], hellaswag(model, items, batch_size, device, rank, world)
    else:
        if stride > model.config.block_size:
            raise UserError(f'stride={stride}: the model sees windows of {model.config.block_size}, and tokens between '
                            'them would not count: use at most that')
        stride = stride or max(1, model.config.block_size // 2)
        lines, result = [], text_loss(model, ids, n_bytes, stride, batch_size, device, rank, world)
    if profile and work and world == 1:
        show_profile(work)
    if rank == 0:
        if lines:
            print(f'{n_params}torch {torch.__version__}, {name_of(device)}', *lines, sep='\n')
        print(json.dumps(dict(task=task, model=init_from, device=name_of(device), dtype=dtype, **result)))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
