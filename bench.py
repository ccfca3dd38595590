"""
Measure how fast this code is, and how good a model is.

$ python bench.py --task=train                       # train GPT-2 124M
$ python bench.py --task=generate --quantize=int8
$ python bench.py --task=generate --rival=../nanoGPT # nanoGPT's code instead
$ python bench.py --task=hellaswag --init_from=gpt2  # commonsense accuracy
$ python bench.py --task=loss --init_from=gpt2 --source=book.txt
$ python bench.py --task=curves --runs=out-a,out-b --axis=seconds

The last line of the output is the result as JSON. On several GPUs, train.py
prints its own speed.
"""
import contextlib
import json
import math
import os
import re
import runpy
import statistics
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from configurator import UserError, check, configure, optional, resolve_device, resolve_dtype
from model import (
    GPT,
    GPTConfig,
    config_from_settings,
    configure_optimizers,
    keep_memory,
    load_checkpoint,
    optimize_for_generation,
    peak_flops,
)
from prepare import DATA, Progress, encode_files, get_tokenizer, load_dataset, locate

task = 'train'      # 'train', 'generate', 'hellaswag', 'loss' or 'curves'
init_from = ''      # a run's folder, a checkpoint, or gpt2-xl; '': random weights
# speed
rival = ''          # measure this instead: a checkout of nanoGPT
batch_size = 0      # sequences side by side; 0: 8 for train, 1 for generate
repeats = 5         # number of measurements; their median is reported
profile = False     # train, generate: print where the time goes, and write trace.json
optimizer = 'adamw'  # train: 'adamw' or 'muon'
warmup = 3          # train: steps before the first measurement
steps = 5           # train: steps in a measurement
prompt = 32         # generate: tokens in the prompt
new_tokens = 128    # generate: tokens to write
# quality
source = ''         # loss: a text or a val.bin; hellaswag: its file, '': download it
stride = 0          # loss: tokens from the start of one window to the next; 0: half a window
# loss curves
runs = ''           # folders of runs, or files with nanoGPT's output: out-a,nanoGPT=log.txt
axis = 'steps'      # horizontal axis: 'steps', 'tokens' or 'seconds'
plot = ''           # picture to write, such as curves.png; '': draw in the terminal
title = 'val loss (faint: train loss)'  # title of the picture
# system
seed = 1337
device = 'auto'     # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best available
dtype = 'auto'      # 'float32', 'bfloat16', 'float16'; auto: as in train.py, for quality float32
compile = 'auto'    # torch.compile: True, False; auto: on CUDA
quantize = ''       # 'int8': 8-bit arithmetic on a CPU, for all tasks but train

globals().update(vars(GPTConfig(vocab_size=50304, bias=False)))  # the model's settings

HELLASWAG = 'https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl'

settings = configure(globals())
check(settings, "task in ('train', 'generate', 'hellaswag', 'loss', 'curves')", 'repeats > 0', 'steps > 0',
      'new_tokens > 1', 'stride >= 0', "optimizer in ('adamw', 'muon')",
      "axis in ('steps', 'tokens', 'seconds')", "quantize in ('', 'int8')")
config = config_from_settings(settings)
device = resolve_device(device)
device_type = device.partition(':')[0]
if not rival:
    keep_memory()
torch.manual_seed(seed)
if rival and (init_from or task not in ('train', 'generate')):
    raise UserError('a rival is for train and generate, without init_from')

# -- speed --------------------------------------------------------------------


def load_model():
    """The model to measure, and its tokenizer's spec: None where the weights are random."""
    if init_from:
        checkpoint = load_checkpoint(init_from)
        return GPT.from_checkpoint(checkpoint, dropout=config.dropout), checkpoint['tokenizer']
    if not rival:
        return GPT(config), None
    nanogpt = runpy.run_path(os.path.join(rival, 'model.py'))
    fields = nanogpt['GPTConfig'].__dataclass_fields__
    args = {name: value for name, value in vars(config).items() if name in fields}
    return nanogpt['GPT'](nanogpt['GPTConfig'](**args)), None


def print_profile(work):
    """Call work once more, and print which operations take its time."""
    with torch.profiler.profile() as profiler:
        work()
    order = 'self_cpu_time_total' if device_type == 'cpu' else 'self_device_time_total'
    print(profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=40))
    profiler.export_chrome_trace('trace.json')


def peak_memory():
    """The most GB in use so far, on the GPU or by this process; None where unknown."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == 'linux':
        import resource
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def measure_training():
    """Time training steps on random tokens."""
    model, _ = load_model()
    model.to(device).train()
    train_dtype = resolve_dtype(dtype, device)
    hyperparameters = 0.1, 6e-4, (0.9, 0.95)  # weight decay, learning rate, betas
    if rival:
        optimizers = [model.configure_optimizers(*hyperparameters, device_type)]
    else:
        optimizers = configure_optimizers(model, optimizer, *hyperparameters)
        flops_per_token = model.flops_per_token()
    shape = 2, batch_size or 8, model.config.block_size
    x, y = torch.randint(model.config.vocab_size, shape, device=device)
    compiled = device_type == 'cuda' if compile == 'auto' else compile
    if compiled and device_type == 'cpu' and not rival:
        model.compile_blocks()
    elif compiled:
        model.compile()
    autocast = torch.autocast(device_type, getattr(torch, train_dtype), train_dtype != 'float32')
    scaler = torch.amp.GradScaler(device_type, enabled=train_dtype == 'float16')

    def train(count):
        """Take steps that do the same work as train.py's."""
        for _ in range(count):
            with autocast:
                _, loss = model(x, y)
            scaler.scale(loss).backward()
            for opt in optimizers:
                scaler.unscale_(opt)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            norm.item()  # waits for the GPU, as train.py does to notice an overflow
            for opt in optimizers:
                scaler.step(opt)
            scaler.update()
            model.zero_grad(set_to_none=True)

    synchronize = getattr(torch, device_type).synchronize
    train(warmup)
    synchronize()
    step_ms = []
    for _ in range(repeats):
        begin = time.perf_counter()
        train(steps)
        synchronize()
        step_ms.append(1000 * (time.perf_counter() - begin) / steps)
    if profile:
        print_profile(partial(train, steps))
    rates = [x.numel() / ms * 1000 for ms in step_ms]
    result = dict(dtype=train_dtype, compile=compiled, step_ms=step_ms,
                  tokens_per_second=rates, memory_gb=peak_memory())
    peak = peak_flops(device, train_dtype)
    if peak and not rival:
        result['mfu'] = flops_per_token * statistics.median(rates) / peak
    return result


def measure_generation():
    """Time the first token, with reading the prompt, and the others."""
    model, _ = load_model()
    model_dtype = resolve_dtype(dtype, device)
    model.to(device, getattr(torch, model_dtype)).eval()
    parameters = sum(p.numel() for p in model.parameters())
    if not rival:
        optimize_for_generation(model, quantize == 'int8')
    rows = batch_size or 1
    idx = torch.randint(min(model.config.vocab_size, 50257), (rows, prompt), device=device)
    options = dict(max_new_tokens=new_tokens, temperature=0.8, top_k=200)

    def write():
        """Return the time at the start and after each token; a rival yields all tokens at once."""
        times = [time.perf_counter()]
        for token in [model.generate(idx, **options)] if rival else model.stream(idx, **options):
            token.tolist()  # waits for the GPU
            times.append(time.perf_counter())
        return times

    write()  # warm up
    rounds = [write() for _ in range(repeats)]
    if profile:
        print_profile(write)
    result = dict(dtype=model_dtype, parameters=parameters)
    result['tokens_per_second'] = [rows * new_tokens / (t[-1] - t[0]) for t in rounds]
    if not rival:
        result['first_token_ms'] = [1000 * (t[1] - t[0]) for t in rounds]
        result['decode_per_second'] = [rows * (new_tokens - 1) / (t[-1] - t[1]) for t in rounds]
    return result


# -- quality ------------------------------------------------------------------


def load_for_evaluation():
    """The trained model, its tokenizer and the tokenizer's spec."""
    if not init_from:
        raise UserError(f'task={task} needs a trained model: add --init_from=gpt2, for example')
    torch.set_float32_matmul_precision('highest')  # TF32 would change the scores
    model, spec = load_model()
    model_dtype = 'float32' if dtype == 'auto' else resolve_dtype(dtype, device)
    model.to(device, getattr(torch, model_dtype)).eval()
    if quantize:
        optimize_for_generation(model, int8=True)
    return model, get_tokenizer(spec), spec


@torch.no_grad()
def score_hellaswag():
    """Accuracy: the model chooses the ending with the lowest loss, summed over its tokens (acc) or
    averaged (acc_norm). Published acc_norm: gpt2 0.2945, medium 0.3752, large 0.4320, xl 0.4889."""
    model, tok, _ = load_for_evaluation()
    path = locate(source or HELLASWAG, os.path.join(DATA, task))[0]
    with open(path, encoding='utf-8') as f:
        lines = list(f)
    correct = torch.zeros(2)
    progress = Progress('items', len(lines))
    for number, line in enumerate(lines):
        item = json.loads(line)
        context = tok.encode(item['ctx']).tolist()
        endings = [tok.encode(f' {ending}').tolist() for ending in item['endings']]
        inputs, targets = [], []
        for ending in endings:  # long contexts are cut from the left
            ids = torch.tensor((context + ending)[-model.config.block_size - 1:])
            target = ids[1:].clone()
            target[:-len(ending)] = -1  # scores only the ending
            inputs.append(ids[:-1])
            targets.append(target)
        x = pad_sequence(inputs, batch_first=True).to(device)
        y = pad_sequence(targets, batch_first=True, padding_value=-1).to(device)
        logits = model(x)[0].transpose(1, 2).float()
        losses = F.cross_entropy(logits, y, ignore_index=-1, reduction='none').sum(dim=1)
        means = losses / (y >= 0).sum(dim=1)
        correct += torch.tensor([losses.argmin() == item['label'], means.argmin() == item['label']])
        progress(number)
    acc, acc_norm = (correct / len(lines)).tolist()
    return dict(items=len(lines), acc=acc, acc_norm=acc_norm)


def read_source(tok, spec):
    """The ids of a text, or of the val.bin of a dataset with this tokenizer, and which of them count."""
    if source.endswith('.bin'):
        meta, _ = load_dataset(os.path.dirname(os.path.abspath(source)))
        if meta['tokenizer'] != spec:
            raise UserError(f'source={source} uses another tokenizer than the model: pass the text itself, '
                            f'or prepare it with --tokenizer={init_from}')
        ids = np.fromfile(source, meta['dtype'])
        mask = np.fromfile(source[:-3] + 'mask', bool) if meta.get('chat') else np.ones(len(ids), bool)
        return ids, mask
    ids, mask = [np.zeros(0, int)], [np.zeros(0, bool)]
    for piece, counts in encode_files(locate(source, os.path.join(DATA, task)), tok):
        ids.append(piece)
        mask.append(np.full(len(piece), counts))
    ids, mask = np.concatenate(ids), np.concatenate(mask)
    if mask.all() and ids[-1:].tolist() == [tok.eot]:  # the end of a text, but not of an answer
        ids, mask = ids[:-1], mask[:-1]
    return ids, mask


@torch.no_grad()
def score_text():
    """Loss of every token of a text except the first. Windows start stride tokens apart, and each
    scores the tokens after the previous one. A smaller stride gives them more context."""
    model, tok, spec = load_for_evaluation()
    ids, mask = read_source(tok, spec)
    if not mask[1:].any():
        raise UserError(f'source={source!r} has no tokens to score: give a longer text')
    ids = torch.from_numpy(ids.astype(np.int64))
    targets = ids.where(torch.from_numpy(mask), -1)
    n_inputs = len(ids) - 1
    size = model.config.block_size
    if stride > size:
        raise UserError(f'stride={stride} skips tokens: use at most {size}, the block_size of the model')
    last = max(0, n_inputs - size)
    starts = [*range(0, last, stride or max(1, size // 2)), last]
    nats = 0
    progress = Progress('windows', len(starts))
    for i, start in enumerate(starts):
        end = min(start + size, n_inputs)
        y = targets[start + 1:end + 1].clone()
        if i > 0:
            y[:starts[i - 1] + size - start] = -1  # the previous window scores these
        _, loss = model(ids[None, start:end].to(device), y[None].to(device))
        nats += loss.item() * (y >= 0).sum().item()
        progress(i)
    scored = [i for i in targets[1:].tolist() if i >= 0]
    count = len(scored)
    n_bytes = len(tok.decode_bytes([i for i in scored if i != tok.eot]))
    return dict(tokens=count, loss=nats / count, perplexity=math.exp(nats / count),
                bits_per_byte=nats / math.log(2) / max(1, n_bytes))


# -- loss curves --------------------------------------------------------------


def read_nanogpt_output(path):
    """The entries that log.jsonl would have, from what nanoGPT printed with log_interval=1."""
    entries = []
    seconds = 0
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            if match := re.match(r'step (\d+): train loss .*, val loss ([\d.]+)', line):
                entries.append(dict(iter=int(match[1]), val_loss=float(match[2]), seconds=seconds))
            elif match := re.match(r'iter (\d+): loss ([\d.]+), time ([\d.]+)ms', line):
                seconds += float(match[3]) / 1000
                entries.append(dict(iter=int(match[1]), loss=float(match[2]), seconds=seconds))
    return entries


def read_run(path):
    """The losses of a run: {'train': [(x, loss), ...], 'val': [(x, loss), ...]}, x as axis says."""
    entries = []
    if os.path.isdir(path):
        with open(os.path.join(path, 'log.jsonl'), encoding='utf-8', errors='replace') as f:
            for line in f:
                with contextlib.suppress(ValueError):  # half a line, when the disk was full
                    entries.append(json.loads(line))
    else:
        entries = read_nanogpt_output(path)
    points = dict(train={}, val={})
    x = 'iter' if axis == 'steps' else axis
    for entry in entries:
        for split, y in (('train', 'loss'), ('val', 'val_loss')):
            if x in entry and math.isfinite(entry.get(y, math.nan)):  # a step's last entry counts
                points[split][entry['iter']] = entry[x], entry[y]
    if not points['val']:
        raise UserError(f'{path} has no val loss by {axis} yet')
    return {split: [points[split][step] for step in sorted(points[split])] for split in points}


def draw_curves():
    """Draw the losses of runs, and return the best val loss of each."""
    curves = {}
    for run in runs.split(','):
        name, _, path = run.rpartition('=')
        curves[name or path] = read_run(path)
    # a scale that includes the first evaluation would flatten the rest
    losses = [y for points in curves.values() for _, y in points['val'][1:] or points['val']]
    margin = (max(losses) - min(losses)) / 20 or 0.1
    best = {name: min(y for _, y in points['val']) for name, points in curves.items()}
    draw = draw_picture if plot else draw_in_terminal
    draw(curves, min(best.values()) - margin, max(losses) + margin)
    print('best val loss:')
    return best


def draw_picture(curves, low, high):
    """Write a picture of val and train losses between low and high."""
    figure, axes = optional('matplotlib.pyplot', f'plot={plot}').subplots(figsize=(8, 5))
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points['train'], strict=True), color=f'C{number}', alpha=0.3)
        axes.plot(*zip(*points['val'], strict=True), color=f'C{number}', marker='o', label=name)
    axes.set(title=title, xlabel=axis, ylabel='loss', ylim=(low, high))
    axes.legend()
    figure.savefig(plot, dpi=100)
    print(f'wrote {plot}')


def draw_in_terminal(curves, low, high, width=70, height=20):
    """Print val losses between low and high, one letter for each run."""
    rows = [[' '] * width for _ in range(height)]
    end = max(x for points in curves.values() for x, _ in points['val']) or 1
    for letter, (name, points) in zip('abcdefghijklmnopqrstuvwxyz', curves.items(), strict=False):
        print(f'{letter}: {name}')
        for x, y in points['val']:
            if y <= high:
                row = rows[round((high - y) / (high - low) * (height - 1))]
                column = round(x / end * (width - 1))
                row[column] = letter if row[column] in (' ', letter) else '*'  # *: runs overlap
    for number, row in enumerate(rows):
        y = high - (high - low) * number / (height - 1)
        print(f'{y:8.3f}|{"".join(row).rstrip()}')
    print(f'val loss+{"-" * width}')
    ticks = [f'{end * i / 4:>17,.0f}' for i in (1, 2, 3, 4)]
    print(f'{"0":>10}{"".join(ticks)}\n{axis:>78}')


# -- run a task ---------------------------------------------------------------

functions = dict(train=measure_training, generate=measure_generation, hellaswag=score_hellaswag,
                 loss=score_text, curves=draw_curves)
result = functions[task]()
for name, value in result.items():
    if isinstance(value, list):
        result[name] = statistics.median(value)
        print(f'{name:<20}{result[name]:,.2f}, median of {len(value)}, '
              f'{min(value):,.2f} to {max(value):,.2f}')
    else:
        print(f'{name:<20}{value:,.4f}' if isinstance(value, float) else f'{name:<20}{value}')
machine = torch.cuda.get_device_name(device) if device_type == 'cuda' else device
print(json.dumps(dict(task=task, model=init_from, device=machine, **result)), flush=True)
