"""
Measure a model, or this machine with it.

$ python bench.py --task=train                                    # a training step of GPT-2 124M
$ python bench.py --task=generate --init_from=gpt2                # time to the first token, and rate of the others
$ python bench.py --task=prepare                                  # tokenizers
$ python bench.py --task=generate --vs=../nanoGPT                 # and the same with another code, in turn
$ python bench.py --task=hellaswag --init_from=gpt2               # how often it picks the sensible ending of four
$ python bench.py --task=loss --init_from=gpt2 --source=book.txt --stride=512   # perplexity and bits per byte
$ python bench.py --task=curves --runs=out-a,out-b --plot=curves.png            # their losses by step, tokens and time

The last line is the result as JSON. Under torchrun, train measures DDP, hellaswag and loss are shared among the GPUs.
"""
import contextlib
import io
import itertools
import json
import math
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import UserError, check, configure, keep_memory, optional, resolve
from model import GPT, GPTConfig, load_checkpoint
from prepare import DATA, SHAKESPEARE, Progress, get_tokenizer, load_dataset, locate, prepare, read
from train import autocast_for, backward, compile_problem, compiled, leave, peak_flops, update

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


def peak_memory(device):
    """The most memory that was in use, in bytes: the GPU's, or this process's."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated()
    if device == 'mps':
        return torch.mps.driver_allocated_memory()
    if os.path.exists('/proc/self/status'):  # what getrusage says includes the process that started this one
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) for line in f if line.startswith('VmHWM')) * 1024
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def seconds_of(work, repeats, device):
    """How long work took, each time."""
    synchronize, seconds = getattr(torch, device.partition(':')[0]).synchronize, []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def spread(values, unit, digits=1, steps=''):
    """Their median, and between which values it lies."""
    low, median, high = (f'{f(values):,.{digits}f}' for f in (min, statistics.median, max))
    return f'{median} {unit}: median of {len(values)}{steps} ({low} to {high})'


def matmul_rate(device, dtype):
    """Floating point operations a second in products of large matrices: the most that this machine does."""
    n = 2048 if device == 'cpu' else 8192
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    return 2 * n ** 3 / min(seconds_of(lambda: a @ a, 8, device))


def read_rate(device):
    """Bytes a second that it reads from memory: of a sum and of dot products, the faster."""
    x = torch.ones(2 ** 27, device=device)
    ways = (x.sum, lambda: torch.bmm(x.view(8, 1, -1)[:, :, :4096], x.view(8, -1, 4096).transpose(1, 2)))
    return x.nbytes / min(s for way in ways for s in seconds_of(way, 8, device))


def show_profile(work):
    """Where the time goes, by operation."""
    with torch.profiler.profile() as profiler:
        work()
    order = 'self_cpu_time_total' if not torch.cuda.is_available() else 'self_device_time_total'
    print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    profiler.export_chrome_trace('trace.json')
    print('trace.json shows it over time, in chrome://tracing or ui.perfetto.dev')


def their_model(folder, config):
    """nanoGPT's model of the same shape."""
    try:
        module = runpy.run_path(os.path.join(folder, 'model.py'))
        GPT, GPTConfig = module['GPT'], module['GPTConfig']
    except (OSError, KeyError) as error:
        raise UserError(f'vs={folder}: there is no nanoGPT in it ({error})') from None
    return GPT(GPTConfig(**{k: v for k, v in vars(config).items() if k in GPTConfig.__dataclass_fields__}))


def training(model, rival, batch_size, block_size, optimizer, warmup, steps, repeats, device, dtype, compile, world,
             profile):
    """What a training step on random tokens takes."""
    device_type, config = device.partition(':')[0], model.config
    flops, block_size = model.flops_per_token(), min(block_size, config.block_size)
    if rival:
        model = their_model(rival, config).to(device)
        dtype = dtype if device_type == 'cuda' else 'float32'  # all that its train.py does elsewhere
        optimizers = dict(adamw=model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device_type))
    else:
        optimizers = model.configure_optimizers(optimizer, 0.1, 6e-4, (0.9, 0.95))
    if compile:
        model = compiled(model, by_block=device == 'cpu' and not rival)
    if world > 1:
        model = DDP(model, [device] if device_type == 'cuda' else None, gradient_as_bucket_view=True)
    batch = torch.randint(config.vocab_size, (2, batch_size, block_size), device=device)
    autocast, scaler = autocast_for(device, dtype), torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    if compile and (problem := compile_problem(model, batch, autocast)):
        raise UserError(f'{problem}: measure with --compile=False')

    def work(count=steps):
        for _ in range(count):
            update(model, optimizers, scaler, backward(model, optimizers, scaler, [batch], 1.0, autocast)[1])
    work(warmup)
    seconds = [s / steps for s in seconds_of(work, repeats, device)]
    memory, median, tokens = peak_memory(device), statistics.median(seconds), batch_size * block_size * world
    known = peak_flops(device, dtype)
    rate, ceiling = flops * tokens / median, (known or matmul_rate(device, dtype)) * world
    print(f'{batch_size} x {block_size} tokens, {world} processes, {dtype}, compile={compile}')
    print('step   ', spread([s * 1000 for s in seconds], 'ms', 2, f' x {steps} steps after {warmup}'))
    print(f'tokens  {tokens / median:,.0f}/s')
    print(f'FLOPs   {rate / 1e9:,.0f} G/s, {rate / ceiling:.1%} of',
          'its data sheet' if known else 'what large products reach here')
    print(f'memory  {memory / 2**30:.2f} GiB at most')
    if profile and world == 1:
        show_profile(work)
    return dict(seconds=median, step_ms=median * 1000, tokens_per_second=tokens / median, flops=rate,
                of_peak=rate / ceiling, memory=memory, processes=world)


def generating(model, rival, batch_size, prompt, new_tokens, repeats, device, dtype, compile, profile):
    """What it takes to write: the first token with the reading of the prompt, and the rate of those after it."""
    config, spans, options = model.config, [], dict(max_new_tokens=new_tokens, temperature=0.8, top_k=200)
    idx = torch.randint(min(config.vocab_size, 50257), (batch_size, prompt), device=device)
    if rival == 'transformers':
        hf = optional('transformers', 'vs=transformers')
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**vars(config), n_positions=config.block_size, bos_token_id=0,
                                                 eos_token_id=0))
        options |= dict(attention_mask=torch.ones_like(idx), min_new_tokens=new_tokens, do_sample=True, pad_token_id=0)
    elif rival:
        model = their_model(rival, config)
    else:
        options['compile'] = compile
    if rival:
        model.to(device, getattr(torch, dtype)).eval()

    def work():
        begin, tokens = time.perf_counter(), model.generate(idx, **options)
        if not rival:  # ours come one by one
            next(tokens).tolist()
            first = time.perf_counter()
            for token in tokens:
                token.tolist()
            spans.append((first - begin, time.perf_counter() - first))
    work()
    rates = [new_tokens * batch_size / s for s in seconds_of(work, repeats, device)]
    result = dict(tokens_per_second=statistics.median(rates))
    print(f'{batch_size} x {new_tokens} tokens after {prompt}, {dtype}, compile={compile}')
    print('in all        ', spread(rates, 'tokens/s'))
    if not rival and new_tokens > 1:
        first, rest = map(statistics.median, zip(*spans[1:], strict=True))
        weights = sum(p.nbytes for name, p in model.named_parameters(remove_duplicate=False)
                      if '.wte' not in name and '.wpe' not in name)  # of which a row is read; the head is named apart
        step, bandwidth = rest / (new_tokens - 1), read_rate(device)
        print(f'first token    {first * 1000:,.1f} ms')
        print(f'the others     {batch_size / step:,.1f} tokens/s, {step * 1000:,.2f} ms a step')
        print(f'memory         {weights / step / 1e9:,.1f} GB/s of weights, {weights / step / bandwidth:.1%} of '
              f'what this machine reads ({bandwidth / 1e9:,.1f} GB/s)')
        result |= dict(first_token_ms=first * 1000, decode_per_second=batch_size / step, weights=weights,
                       read_rate=bandwidth, of_bandwidth=weights / step / bandwidth)
    if profile:
        show_profile(work)
    return result


def preparing(rival, megabytes, tokenizer, repeats):
    """How fast text becomes tokens, from file to files: the embedded text, again and again."""
    result = {}
    with open(SHAKESPEARE, encoding='utf-8') as f, tempfile.TemporaryDirectory() as folder:
        text, path = f.read(), os.path.join(folder, 'input.txt')
        with open(path, 'w', encoding='utf-8') as out:
            out.write((text * math.ceil(megabytes * 1e6 / len(text)))[:int(megabytes * 1e6)])

        def tokenize(name):
            with contextlib.redirect_stdout(io.StringIO()):
                if rival:  # a script that reads the input.txt beside it
                    script = os.path.join('data', 'shakespeare_char' if name == 'char' else 'shakespeare', 'prepare.py')
                    runpy.run_path(shutil.copy(os.path.join(rival, script), folder))
                else:
                    prepare(os.path.join(folder, 'ours'), path, name)

        for name in [tokenizer] if tokenizer else ['char', 'gpt2'] + ['bpe'] * (not rival):
            rates = [megabytes / s for s in seconds_of(partial(tokenize, name), repeats, 'cpu')]
            print(f'{name:5}', spread(rates, 'MB/s'))
            result[name] = statistics.median(rates)
    return result


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
    room = block_size + 1 - max((len(ids) for _, endings, _ in items for ids in endings), default=0)
    if room < 1:
        raise UserError(f'{path} has endings of {block_size + 1 - room} tokens, and the model sees {block_size}: take '
                        'one with a larger block_size')
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
    rows = torch.tensor([[context[-1], *ids] + [-1] * (longest - len(ids))
                         for context, item in zip(contexts, endings, strict=True) for ids in item], device=device)
    logits = model.lm_head(model.hidden(rows[:, :-1].clamp(min=0), cache, width - 1))
    losses = F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], ignore_index=-1, reduction='none')
    return losses.sum(dim=1).view(len(contexts), -1).cpu()


def hellaswag(model, checkpoint, files, batch_size, device, rank, world):
    """How often the right ending has the least loss in all (acc), and the least loss a token (acc_norm)."""
    tok, size = get_tokenizer(checkpoint['tokenizer']), model.config.block_size
    items = [item for path in files for item in read_hellaswag(path, tok, size)]
    if not items:
        raise UserError(f'source: there are no items in {", ".join(files) or "this folder"}')
    alike = [list(group) for _, group in itertools.groupby(items, lambda item: (len(item[0]), len(item[1])))]
    batches = [group[i:i + batch_size] for group in alike for i in range(0, len(group), batch_size)][rank::world]
    counts, progress = torch.zeros(3), Progress('hellaswag', len(items) / world, 'items')
    for batch in batches:
        contexts, endings, labels = zip(*batch, strict=True)
        losses, right = ending_losses(model, contexts, endings, device), torch.tensor(labels)
        lengths = torch.tensor([[len(ids) for ids in item] for item in endings])
        counts += torch.tensor([len(batch), *((x.argmin(1) == right).sum() for x in (losses, losses / lengths))])
        progress(counts[0].item())
    if world > 1:
        dist.all_reduce(counts)
    n, *right = counts.tolist()
    acc, acc_norm = (count / n for count in right)
    acc_stderr, acc_norm_stderr = (math.sqrt(p * (1 - p) / max(1, n - 1)) for p in (acc, acc_norm))
    print(f'acc       {acc:.4f} +- {acc_stderr:.4f}, by the whole loss of an ending, {n:,.0f} items')
    print(f'acc_norm  {acc_norm:.4f} +- {acc_norm_stderr:.4f}, by its loss a token')
    print(f'published acc_norm, of 10,042 items: {PUBLISHED}')
    return dict(items=int(n), acc=acc, acc_stderr=acc_stderr, acc_norm=acc_norm, acc_norm_stderr=acc_norm_stderr)


@torch.no_grad()
def text_loss(model, checkpoint, files, stride, batch_size, device, rank, world):
    """The mean of -log p of every token but the first. Windows begin stride tokens apart, and each counts for what the
    one before has not reached: at half a window every token has at least half a window before it."""
    ids, n_bytes = read_text(files, checkpoint['tokenizer'])
    size = model.config.block_size
    if stride > size:
        raise UserError(f'stride={stride}: the model sees windows of {size}, and would miss what is between: use at '
                        f'most {size}')
    stride, size = stride or max(1, size // 2), min(size, len(ids) - 1)
    begins = np.append(np.arange(0, len(ids) - 1 - size, stride), len(ids) - 1 - size)
    counted = np.append(0, begins[:-1] + size - begins[1:])  # of each window's targets, in the one before it
    total, progress = torch.zeros(2, dtype=torch.float64), Progress('loss', len(begins) / world, 'windows')
    for first in range(rank * batch_size, len(begins), world * batch_size):
        some = slice(first, first + batch_size)
        rows = torch.from_numpy(ids[begins[some, None] + np.arange(size + 1)].astype(np.int64))
        targets = rows[:, 1:].masked_fill(torch.from_numpy(np.arange(size) < counted[some, None]), -1)
        n = (targets >= 0).sum().item()
        total += torch.tensor([model(rows[:, :-1].to(device), targets.to(device))[1].item() * n, n])
        progress(first / world)
    if world > 1:
        dist.all_reduce(total)
    loss, n = total.tolist()
    perplexity, bits_per_byte = math.exp(loss / n), loss / math.log(2) / n_bytes
    print(f'loss           {loss / n:.4f} a token, {n:,.0f} tokens in windows of {size}, {stride} apart')
    print(f'perplexity     {perplexity:.3f}')
    print(f'bits per byte  {bits_per_byte:.4f}, {n_bytes:,} bytes')
    return dict(tokens=int(n), loss=loss / n, perplexity=perplexity, bits_per_byte=bits_per_byte)


def read_text(files, spec):
    """The ids of a text, documents apart, or of a val.bin in the same tokens; and how many bytes follow the first."""
    tok = get_tokenizer(spec)
    if [path[-4:] for path in files] == ['.bin']:
        meta, _ = load_dataset(os.path.dirname(os.path.abspath(files[0])))
        if meta['tokenizer'] != spec:
            raise UserError(f"{files[0]} has other tokens than the model's: give the text itself")
        ids = np.fromfile(files[0], meta['dtype'])
    else:
        parts, separator = [], [] if tok.eot is None else [tok.eot]
        for text, ends in read(files, 'tokens'):
            parts += [tok.encode(text), separator * ends]
        ids = np.concatenate([[], *parts[:-1]]).astype(np.uint16)
    if len(ids) < 2:
        raise UserError(f'{", ".join(files) or "source"} has {len(ids)} tokens: there is nothing to predict')
    return ids, len(tok.decode_bytes(ids[1:][ids[1:] != tok.eot]))


def read_run(folder):
    """What log.jsonl says of a run: {'train': [(step, tokens, seconds, loss), ...], 'val': the same}."""
    curves, path = dict(train=[], val=[]), os.path.join(folder, 'log.jsonl')
    at = seconds = pace = per_step = 0  # steps and time up to the last training loss; time and tokens of one step
    try:
        with open(path, encoding='utf-8') as f:
            for line in f:
                with contextlib.suppress(json.JSONDecodeError):  # half a line, as a kill or a full disk leaves it
                    entry = json.loads(line)
                    step = entry['iter']
                    if 'loss' in entry:
                        step, pace = step + 1, entry['time_ms'] / 1000
                        per_step = round(pace * entry['tokens_per_second'])
                        at, seconds = step, seconds + (step - at) * pace
                    for split, key in (('train', 'loss'), ('val', 'val_loss')):
                        if math.isfinite(entry.get(key, math.nan)):
                            curves[split].append((step, step * per_step, seconds + (step - at) * pace, entry[key]))
    except FileNotFoundError:
        raise UserError(f'runs={folder}: there is no {path}: name folders of runs, --runs=out-a,out-b') from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__}: {error})') from None
    if not curves['val']:
        raise UserError(f'{path} holds no evaluation yet')
    return curves


AXES = 'steps', 'tokens', 'seconds'


def picture(runs, path):
    """Their losses, drawn by matplotlib."""
    figure, plots = optional('matplotlib.pyplot', f'plot={path}').subplots(1, 3, figsize=(15, 4.5), sharey=True)
    for axis, label in enumerate(AXES):
        for number, (name, curves) in enumerate(runs.items()):
            for split, style in (('train', dict(alpha=0.3)), ('val', dict(marker='o', label=name))):
                x, y = ([p[i] for p in curves[split]] for i in (axis, 3))
                plots[axis].plot(x, y, f'C{number}', **style)
        plots[axis].set(xlabel=label, ylabel='loss (faint: train)' * (axis == 0))
    plots[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    print(f'{path}: {", ".join(runs)}')


def characters(runs, width=72, height=18):
    """The same in the terminal."""
    names = dict(zip(runs, itertools.cycle('abcdefghijklmnopqrstuvwxyz'), strict=False))
    points = [(p, '.') for curves in runs.values() for p in curves['train'] if len(runs) == 1]  # else, whose are they?
    points += [(p, names[run]) for run, curves in runs.items() for p in curves['val']]
    low, high = (f(p[3] for p, _ in points) for f in (min, max))
    for axis, label in enumerate(AXES):
        most, rows = max(p[axis] for p, _ in points) or 1, [[' '] * width for _ in range(height)]
        for p, mark in points:
            row = rows[round((high - p[3]) / max(high - low, 1e-9) * (height - 1))]
            row[round(p[axis] / most * (width - 1))] = mark
        for number, row in enumerate(rows):
            print(f'{high - (high - low) * number / (height - 1):7.3f} |' + ''.join(row).rstrip())
        print(f'{"":8}+{"-" * width}\n{"":9}0{f"{most:,.0f} {label}":>{width - 1}}\n')
    dots = '; train loss: dots' if len(runs) == 1 else ''
    print('val loss: ' + ', '.join(f'{mark} {run}' for run, mark in names.items())
          + f'{dots}. --plot=curves.png makes a picture of it (pip install matplotlib)')


def alternate(task, vs, repeats):
    """The same work in processes of its own, ours and the rival's in turn: medians, and their ratio."""
    if task not in ('train', 'generate', 'prepare'):
        raise UserError(f'vs={vs}: this is for the tasks train, generate and prepare')
    results = {'': [], vs: []}
    for rival in list(results) * repeats:
        command = [sys.executable, __file__, *sys.argv[1:], '--vs=', '--repeats=1', f'--rival={rival}']
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f'vs={vs}: this failed: {" ".join(command)}')
        result = json.loads(done.stdout.splitlines()[-1])
        results[rival].append({k: v for k, v in result.items() if k in COMPARED})
        print(f'{rival or "ours":24}', {k: round(v, 1) for k, v in results[rival][-1].items()}, flush=True)
    ours, theirs = ({k: statistics.median(r[k] for r in runs) for k in runs[0]} for runs in results.values())
    for key in theirs:
        print(f'{key}: {ours[key]:,.1f} against {theirs[key]:,.1f}: {ours[key] / theirs[key]:.2f} times, '
              f'medians of {repeats}')
    return dict(vs=vs, ours=ours, theirs=theirs)


if __name__ == '__main__':
    settings = configure(globals())
    check(settings, "task in ('train', 'generate', 'prepare', 'hellaswag', 'loss', 'curves')", 'batch_size >= 0',
          'warmup >= 0', 'steps > 0', 'repeats > 0', 'seed >= 0', 'stride >= 0', 'prompt > 0', 'new_tokens > 0',
          'megabytes > 0', "optimizer in ('adamw', 'muon')", "quantize in ('', 'int8')",
          "tokenizer in ('', 'char', 'gpt2', 'bpe')")
    judging = task in ('hellaswag', 'loss')
    if quantize and task == 'train':
        raise UserError(f'quantize={quantize}: weights of 8 bits cannot be trained, leave it out')
    if judging and not (init_from and (source or task == 'hellaswag')):
        raise UserError(f'task={task} needs a trained model, --init_from=gpt2 or the folder of a run'
                        + ', and a text, --source=FILE' * (task == 'loss'))
    device, dtype, compile = resolve(device, 'float32' if judging and dtype == 'auto' else dtype, compile,
                                     width=n_embd if task == 'train' else 0)
    if settings['compile'] == 'auto' and task == 'generate':
        compile = device != 'mps'
    if task == 'curves':
        curves = {folder: read_run(folder) for folder in runs.split(',')}
        if plot:
            picture(curves, plot)
        else:
            characters(curves)
        print(json.dumps(dict(task=task, **{name: min(p[3] for p in run['val']) for name, run in curves.items()})))
        sys.exit()
    if vs:
        print(json.dumps(dict(task=task, **alternate(task, vs, repeats))))
        sys.exit()

    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    batch_size = batch_size or (1 if task == 'generate' else 8)
    torch.manual_seed(seed)
    if not rival:
        keep_memory()
    if world > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
    if rank > 0:
        dist.barrier()  # the first process downloads what the others then find
    files = locate(source or HELLASWAG, os.path.join(DATA, task), {}, 0) if judging else []
    model = checkpoint = None
    if init_from:
        checkpoint = load_checkpoint(init_from)
        model = GPT.from_checkpoint(checkpoint, dropout=dropout)
    elif task != 'prepare':
        with torch.device('meta' if rival else 'cpu'):  # of ours only the shape matters then
            model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, rope, qk_norm, relu2))
    if rank == 0 and world > 1:
        dist.barrier()
    machine = torch.cuda.get_device_name(device) if 'cuda' in device else f'{device}, {torch.get_num_threads()} threads'
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')  # one of them speaks
    if not judging:
        print(f'{model.num_params():,} parameters, ' if model else '', f'torch {torch.__version__}, {machine}', sep='')
    if model and not rival:
        if quantize:
            model.quantize()
        model.to(device, torch.float32 if task == 'train' else getattr(torch, dtype)).train(task == 'train')
    if task == 'train':
        result = training(model, rival, batch_size, block_size, optimizer, warmup, steps, repeats, device, dtype,
                          compile, world, profile)
    elif task == 'generate':
        result = generating(model, rival, batch_size, prompt, new_tokens, repeats, device, dtype, compile, profile)
    elif task == 'prepare':
        result = preparing(rival, megabytes, tokenizer, repeats)
    elif task == 'hellaswag':
        result = hellaswag(model, checkpoint, files, batch_size, device, rank, world)
    else:
        result = text_loss(model, checkpoint, files, stride, batch_size, device, rank, world)
    print(json.dumps(dict(task=task, model=init_from, device=machine, dtype=dtype, **result)))
    if world > 1:
        leave(0)
