"""
Measure speed on this machine.

$ python bench.py --task=train                                    # a training step of GPT-2 124M
$ python bench.py --task=train --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64
"""
import json
import statistics
import sys
import time

import torch

from configurator import UserError, check, configure, resolve
from model import GPT, GPTConfig
from train import autocast_for, compile_problem, peak_flops, train_step

task = 'train'     # what to measure: train, the time of a training step on random tokens
batch_size = 8     # windows in a step
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
dtype = 'auto'     # of the arithmetic: 'float32', 'bfloat16', 'float16'; auto: what the device is good at
compile = 'auto'   # torch.compile: True, False; auto: on CUDA


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


if __name__ == '__main__':
    settings = configure(globals())
    device, dtype, compile = resolve(device, dtype, compile)
    device_type = device.partition(':')[0]
    autocast = autocast_for(device, dtype)
    check(settings, "task in ('train',)", 'batch_size > 0', 'warmup >= 0', 'steps > 0', 'repeats > 0', 'seed >= 0')
    torch.manual_seed(seed)
    shape = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, rope, qk_norm, relu2)
    model = GPT(shape).to(device)
    batch = torch.randint(vocab_size, (2, batch_size, block_size), device=device)
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
    print(json.dumps(dict(task=task, step_ms=median * 1000, tokens_per_second=tokens / median, flops=rate,
                          memory=peak_memory(device_type), dtype=dtype, device=name)))
