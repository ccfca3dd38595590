"""
A GPT in plain PyTorch: GPT-2 by default, its modern descendants by flags.

The network comes first: attention, where tokens exchange information; the MLP,
where each token is processed alone; the block, which holds both; and the model,
which stacks blocks between an embedding and a head. Then generation, then
checkpoints in and out. Run it to see a model laid out, module by module:

$ python model.py                                  # GPT-2 124M
$ python model.py --n_layer=24 --n_head=16 --n_embd=1024 --batch_size=4
$ python model.py --init_from=gpt2-xl --batch_size=1        # memory to train it
$ python model.py --init_from=out-shakespeare --trace="To be" --layer=1 --head=1
$ python model.py --init_from=out-plain --export_dir=out-plain-hf
"""
import contextlib
import json
import math
import os
import platform
import re
import shutil
import sys
import textwrap
import unicodedata
import warnings
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from configurator import UserError, check, configure, optional
from prepare import DATA, HUB, BPETokenizer, download, get_tokenizer, nanogpt_tokenizer, read_json

# -----------------------------------------------------------------------------
# the network: it needs only torch


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest sequence of tokens that the model can see
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768       # width: size of the vector that describes each token
    dropout: float = 0.0
    bias: bool = True       # biases in linear layers and LayerNorms, as in GPT-2
    rope: bool = False      # rotary positions instead of learned position embeddings
    qk_norm: bool = False   # normalize queries and keys: stable at high learning rates
    relu2: bool = False     # squared ReLU in the MLP instead of GELU

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and below 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        if self.rope and self.n_embd // self.n_head % 2:
            raise ValueError(f'rope needs an even head size, not {self.n_embd // self.n_head}: '
                             'change n_embd or n_head')


def rotate(x, rotation):
    """Rotary positions: rotate each pair (x[i], x[i + half]) of a query or key by an angle
    proportional to its position. The product q k then depends only on the distance between the
    two tokens."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    """The only place where tokens see each other. Each token sends out a query; it and every
    token before it offer a key and a value. The better a key matches the query, the more of
    its value flows: softmax(q k^T / sqrt(head size)) v. Several heads do this side by side, each
    with its own share of the channels."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm

    def queries_keys_values(self, x, rotation=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head size)
        if self.qk_norm:
            q = F.rms_norm(q, q.shape[-1:])
            k = F.rms_norm(k, k.shape[-1:])
        if rotation is not None:
            q = rotate(q, rotation)
            k = rotate(k, rotation)
        return q, k, v

    def forward(self, x, rotation=None, cache=None, place=None, mask=None):
        q, k, v = self.queries_keys_values(x, rotation)
        dtype = q.dtype
        if cache is not None:  # generating: store the new keys and values, attend to all tokens so far
            keys, values = cache
            keys[:, :, place] = k
            values[:, :, place] = v
            q, k, v = q.to(keys.dtype), keys, values
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and (cache is None or q.shape[2] > 1)  # one token sees all others
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        y = y.transpose(1, 2).reshape(x.shape).to(dtype)  # (B, T, C): the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Processes each token independently: expand it to four times its width, apply a nonlinearity,
    project it back. GELU is a smooth ReLU: x times the probability that a normal variable is
    below x. An inactive unit still gets some gradient."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.relu2 = config.relu2

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.relu(x).square() if self.relu2 else F.gelu(x, approximate='tanh')
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP. Each reads a normalized copy of the residual stream and adds its
    result to it. The stream itself runs straight from the embedding to the head, and so do
    gradients on their way back, however many blocks there are."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, *context):
        x = x + self.attn(self.ln_1(x), *context)
        x = x + self.mlp(self.ln_2(x))
        return x


class MeanLoss(torch.autograd.Function):
    """The mean of -log p(target) where targets are not -1: logits (N, vocab_size) -> a number. With
    a large vocabulary nothing takes more memory than logits in float32, so convert 32 MB at a time."""

    @staticmethod
    def parts(logits):
        rows = 2**23 // logits.shape[1] + 1
        return [slice(i, i + rows) for i in range(0, len(logits), rows)]

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        total = 0
        for part in MeanLoss.parts(logits):
            total += F.cross_entropy(logits[part].float(), targets[part], ignore_index=-1,
                                     reduction='sum')
        return total / (targets >= 0).sum()

    @staticmethod
    def backward(ctx, grad):
        """The gradient of one token's loss is its probabilities, minus 1 at the target."""
        logits, targets = ctx.saved_tensors
        counted = targets >= 0
        scale = counted * grad / counted.sum()
        gradient = torch.empty_like(logits)
        for part in MeanLoss.parts(logits):
            p = logits[part].float().softmax(dim=-1)
            p[torch.arange(len(p), device=p.device), targets[part]] -= 1
            gradient[part] = p.mul_(scale[part, None])
        return gradient, None


class GPT(nn.Module):
    """Token ids in; out, at every position, a score (logit) for each possible next token."""
    recompute_activations = False  # recompute blocks in the backward pass: less memory, slower
    compiled = False  # set by compile_blocks

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=None if config.rope else nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one matrix embeds and scores

        # GPT-2's initialization: projections into the residual stream start smaller, so that its
        # variance does not grow with depth
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def hidden(self, idx, cache=None, start=0):
        """Map ids (B, T), the first at position start, to the final hidden states (B, T, C).
        A cache holds the keys and values of the tokens before start; these are added to it. If
        start is a tensor, T is 1 and what the cache holds beyond start is masked."""
        T = idx.shape[1]
        length = T if cache is None else cache[0].shape[3]
        assert length <= self.config.block_size, f'{length} tokens exceed block_size'
        position = start + torch.arange(T, device=idx.device)
        if torch.is_tensor(start):
            place = position  # in the cache
            mask = torch.arange(length, device=idx.device) <= position[:, None]
        else:
            place = slice(start, start + T)
            mask = None

        x = self.transformer.wte(idx)  # (B, T, C)
        rotation = None
        if self.config.rope:
            half = self.config.n_embd // self.config.n_head // 2
            frequency = 10000 ** (-torch.arange(half, device=idx.device) / half)
            angle = position[:, None] * frequency  # (T, half): fast pairs to slow pairs
            rotation = angle.cos(), angle.sin()
        else:
            x = x + self.transformer.wpe(position)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            if self.recompute_activations and torch.is_grad_enabled():
                x = activation_checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation, None if cache is None else cache[i], place, mask)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Ids (B, T) to (logits (B, T, vocab_size), loss). The loss is the mean of
        -log p(target) and ignores targets of -1; without targets it is None."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        rows, targets = logits.flatten(0, 1), targets.flatten()
        if torch.compiler.is_compiling():  # the compiler fuses these steps
            return logits, F.cross_entropy(rows.float(), targets, ignore_index=-1)
        return logits, MeanLoss.apply(rows, targets)

    def compile_blocks(self):
        """Compile block by block: the blocks are alike, so all share one compilation."""
        self.compiled = True
        for block in self.transformer.h:
            block.compile()

    def crop_block_size(self, block_size):
        """Shorten the longest sequence, for example to finetune on shorter texts."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        if not self.config.rope:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].clone())
            wpe.num_embeddings = block_size

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # counts the tied matrix once

    def flops_per_token(self):
        """Floating point operations to train on one token. The forward pass takes 2 for each
        weight of a matrix, and 4 T C in each layer for attention (as if it were not causal).
        The backward pass takes twice as many."""
        matrices = [p for name, p in self.named_parameters() if p.dim() == 2 and 'wpe' not in name]
        attention = self.config.n_layer * self.config.n_embd * self.config.block_size
        return 6 * sum(p.numel() for p in matrices) + 12 * attention


# -----------------------------------------------------------------------------
# optimizers


def orthogonalize(x):
    """For each matrix of a stack, roughly the nearest one whose singular values are all 1. Each
    Newton-Schulz step takes an odd polynomial of them, which moves those in (0, 1] towards 1."""
    if x.is_cuda:
        x = x.bfloat16()  # precise enough
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a a
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x + b x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum for matrices, with an orthogonalized update: it moves all directions equally, not
    only the few that dominate the gradient. The matrices of a group have the same shape, and
    consist of as many independent parts as it says: c_attn is queries, keys and values."""

    def __init__(self, groups, lr, weight_decay, momentum):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            if not params:
                continue
            parts = []
            for p in params:
                state = self.state[p]
                if not state:
                    state['momentum_buffer'] = torch.zeros_like(p)
                mean = state['momentum_buffer']
                mean.lerp_(p.grad, 1 - group['momentum'])
                update = p.grad.lerp(mean, group['momentum'])  # Nesterov's momentum
                parts.extend(update.chunk(group['parts']))
            parts = orthogonalize(torch.stack(parts))
            size = 0.2 * math.sqrt(max(parts.shape[-2:]))  # the usual size of AdamW's updates
            updates = parts.reshape(-1, *p.shape)
            for p, update in zip(params, updates, strict=True):
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(update, alpha=-group['lr'] * size)


def configure_optimizers(model, kind, weight_decay, learning_rate, betas):
    """{'adamw': AdamW for all parameters}; with kind='muon', Muon takes the blocks' matrices.
    Matrices decay, biases and norms do not. One learning rate serves both."""
    blocks = model.transformer.h
    muon_groups = []
    if kind == 'muon':
        muon_groups = [dict(params=[block.attn.c_attn.weight for block in blocks], parts=3),
                       dict(params=[block.attn.c_proj.weight for block in blocks], parts=1),
                       dict(params=[block.mlp.c_fc.weight for block in blocks], parts=1),
                       dict(params=[block.mlp.c_proj.weight for block in blocks], parts=1)]
    taken = {p for group in muon_groups for p in group['params']}
    matrices = [p for p in model.parameters() if p.dim() == 2 and p not in taken]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay),
              dict(params=vectors, weight_decay=0.0)]
    optimizers = dict(adamw=torch.optim.AdamW(groups, learning_rate, betas, fused=True))
    if muon_groups:
        optimizers['muon'] = Muon(muon_groups, learning_rate, weight_decay, momentum=betas[0])
    return optimizers


GPT.configure_optimizers = configure_optimizers


# -----------------------------------------------------------------------------
# generation


def sample_token(logits, temperature=1.0, top_k=None, top_p=None):
    """Choose the next token of each row: logits (B, vocab_size) -> ids (B,).

    temperature below 1 sharpens the distribution, 0 takes the most likely token. top_k keeps the
    k most likely tokens, top_p the fewest whose probabilities add up to it."""
    if temperature < 1e-6:  # dividing by it would overflow
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    nucleus = top_p is not None and top_p < 1
    ids = None
    if top_k or nucleus:
        k = min(top_k or logits.shape[-1], logits.shape[-1])
        logits, ids = logits.topk(k)  # in descending order
    probs = logits.softmax(dim=-1)
    if nucleus:
        before = probs.cumsum(dim=-1) - probs  # probability of the more likely tokens
        probs = probs * (before < top_p)
    if probs.device.type == 'mps':  # its multinomial can draw ids of zero probability
        probs = probs.cpu()
    choice = torch.multinomial(probs, 1).to(logits.device)
    if ids is not None:
        choice = ids.gather(1, choice)
    return choice.squeeze(1)


def new_cache(model, batch_size, length):
    """A tensor for each layer's keys and values: (2, batch_size, n_head, length, head size)."""
    config = model.config
    shape = 2, batch_size, config.n_head, length, config.n_embd // config.n_head
    weight = model.transformer.wte.weight
    dtype = torch.float32 if weight.device.type == 'cpu' else weight.dtype  # attention is faster in it
    return [weight.new_zeros(shape, dtype=dtype) for _ in range(config.n_layer)]


def prefill(model, idx, cache):
    """Read idx (B, T) from position 0: fill the cache, return the logits of the next token."""
    B, T = idx.shape
    rows = 1 if (idx == idx[:1]).all() else B  # a prompt that all rows share is read once
    eager = contextlib.nullcontext()
    if model.compiled:  # do not compile for every length of prompt
        eager = torch.compiler.set_stance('force_eager')
    with eager:
        x = model.hidden(idx[:rows], [layer[:, :rows, :, :T] for layer in cache])
    if rows < B:
        for layer in cache:
            layer[:, 1:, :, :T] = layer[:, :1, :, :T]
    return model.lm_head(x[:, -1]).expand(B, -1)


def record_cuda_graph(step, *inputs):
    """Record the kernels that step launches. Replaying them takes one launch, not hundreds."""
    inputs = [x.clone() for x in inputs]  # the graph reads these, so each replay fills them
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and choose kernels before recording
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(*inputs)

    def replay(*new_inputs):
        for x, new in zip(inputs, new_inputs, strict=True):
            x.copy_(new)
        graph.replay()
        return output
    return replay


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
    """Continue each row of idx (B, T): yields the next token of every row, (B,), max_new_tokens
    times. Ids from vocab_size up (padding) are never chosen.

    The cache holds the keys and values of the tokens so far, so that a step costs one token. When
    it holds block_size tokens, the more recent half is read again as the start of a new one."""
    assert not model.training, 'call model.eval() first: dropout is on'
    device, block_size = idx.device, model.config.block_size
    window = idx[:, -block_size:]
    cache = new_cache(model, len(idx), min(block_size, window.shape[1] + max_new_tokens))

    def decode(token, position, cache=cache):
        """Read one more token of each row, (B, 1): extend the cache, return the next logits."""
        return model.lm_head(model.hidden(token, cache, position)[:, -1])

    # compiled and recorded steps need fixed shapes, so they attend to the whole masked cache
    fixed_shapes = model.compiled or device.type == 'cuda'
    if device.type == 'cuda':  # recording writes to position 0, which the prefill overwrites
        position = torch.zeros((), dtype=torch.long, device=device)
        decode = record_cuda_graph(decode, window[:, -1:], position)

    length = 0  # of the cache in use
    for _ in range(max_new_tokens):
        if window.shape[1] > block_size:
            window = window[:, -max(1, block_size // 2):]
            length = 0
        if length == 0:
            logits = prefill(model, window, cache)
        elif fixed_shapes:
            logits = decode(window[:, -1:], torch.full((), length, device=device))
        else:
            used = [layer[:, :, :, :length + 1] for layer in cache]
            logits = decode(window[:, -1:], length, used)
        length = window.shape[1]
        token = sample_token(logits[:, :vocab_size], temperature, top_k, top_p)
        yield token
        window = torch.cat((window, token[:, None]), dim=1)


GPT.generate = generate  # so that the network above stands alone


# Faster linear layers for generation on a CPU. Each token reads every weight, so reading is what
# takes the time.


class PackedLinear(nn.Module):
    """A linear layer whose weights lie in memory in the order in which oneDNN reads them."""

    def __init__(self, linear):
        super().__init__()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


def round_to_int8(weight):
    """Each row of a matrix in steps of 1/127 of its largest weight: int8 steps and their sizes."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    steps = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return steps, scale


class Int8WeightLinear(nn.Module):
    """A linear layer with 8-bit weights."""

    def __init__(self, linear):
        super().__init__()
        steps, scale = round_to_int8(linear.weight)
        self.register_buffer('scale', scale)
        self.weight = nn.Parameter(steps, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        rows = x.flatten(0, -2).bfloat16()
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        y = y.type_as(x)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights that also rounds its input to 8 bits and multiplies
    integers: almost twice as fast. FBGEMM rounds all rows of the input in steps of one size, so
    rows are first scaled to the same size: a large one would turn the others into zeros."""

    def __init__(self, linear):
        super().__init__()
        steps, scale = round_to_int8(linear.weight)
        zero_points = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns that it will drop quantized tensors
            weight = torch._make_per_channel_quantized_tensor(steps, scale.double(), zero_points, 0)
        self.packed = torch.ops.quantized.linear_prepack(weight, None)
        self.bias = linear.bias

    def forward(self, x):
        if x.shape[:-1].numel() == 1:
            y = torch.ops.quantized.linear_dynamic(x.float(), self.packed)
        else:
            size = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-30)
            y = torch.ops.quantized.linear_dynamic(x / size, self.packed) * size
        y = y.type_as(x)
        return y if self.bias is None else y + self.bias


def optimize_for_generation(model, int8=False, compile=False):
    """Compile the model, or replace its linear layers with faster ones where the CPU has them. 8-bit
    layers can also be compiled. The model can no longer be trained."""
    if compile:
        model.compile_blocks()
    weight = model.lm_head.weight
    if int8 and weight.device.type != 'cpu':
        raise UserError(f"quantize='int8' needs a CPU, not {weight.device}: add --device=cpu")
    packs = (weight.device.type == 'cpu' and platform.machine() in ('x86_64', 'AMD64')
             and torch.backends.mkldnn.is_available())
    if weight.dtype == torch.bfloat16:
        packs = packs and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if int8:  # without VNNI instructions, FBGEMM's sums of products can overflow
        linear_class = Int8Linear if torch.cpu._is_vnni_supported() else Int8WeightLinear
    elif packs and not compile:
        linear_class = PackedLinear
    else:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, linear_class(child))


# -----------------------------------------------------------------------------
# checkpoints: weights from any source become the same kind of dict


def config_from_settings(settings, **changes):
    """The GPTConfig that a script's settings describe."""
    args = {f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings}
    try:
        return GPTConfig(**args | changes)
    except ValueError as error:
        raise UserError(error) from None


# Hugging Face's format

PRETRAINED = {  # layers, heads, width, sha256 of the file where known
    'gpt2': (12, 12, 768, '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
    'gpt2-medium': (24, 16, 1024,
                    'fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd'),
    'gpt2-large': (36, 20, 1280, None),
    'gpt2-xl': (48, 25, 1600, None),
}
TRANSPOSED = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')  # stored that way in the file
MASKS = ('.attn.bias', '.attn.masked_bias')  # in old files
GPT2_CONFIG = dict(  # what a GPT-2's config.json says, explicitly or by default
    model_type='gpt2', activation_function='gelu_new', layer_norm_epsilon=1e-5, n_inner=None,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True,
    add_cross_attention=False)
SAFETENSORS_DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
                          U8=torch.uint8, BOOL=torch.bool)


def beyond_gpt2(config):
    """The flags of a config that GPT-2's format cannot hold."""
    gpt2_fields = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    return [f.name for f in fields(config)
            if f.name not in gpt2_fields and getattr(config, f.name) != f.default]


def read_safetensors(path):
    """Yield (name, tensor) from a .safetensors file: the length of the header, the header as
    JSON, and the tensors' bytes. The header must account for every byte of the file."""
    try:
        with open(path, 'rb') as f:
            header_size = int.from_bytes(f.read(8), 'little')
            header = json.loads(f.read(min(header_size, 100_000_000)))
        header.pop('__metadata__', None)
        entries = sorted((*entry['data_offsets'], name, entry['dtype'], entry['shape'])
                         for name, entry in header.items())
        position = 0
        for begin, end, name, dtype, shape in entries:
            valid = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
            size = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
            if not valid or begin != position or end - begin != size:
                raise ValueError(f'{name}, {dtype} {shape}, cannot be bytes {begin} to {end}')
            position = end
        described, size = 8 + header_size + position, os.path.getsize(path)
        if described != size:
            raise ValueError(f'{size:,} bytes on disk, {described:,} in the header')
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{path} is damaged or not a safetensors file: '
                        f'{str(error)[:200]}') from None
    for begin, end, name, dtype, shape in entries:
        if end > begin:  # map tensors one by one: pages already read count as used memory
            data = np.memmap(path, np.uint8, 'c', 8 + header_size + begin, end - begin)
            yield name, torch.from_numpy(data).view(SAFETENSORS_DTYPES[dtype]).view(shape)


def find_pretrained(name):
    """The file with OpenAI's weights, downloaded once to GPT_CACHE."""
    cache = os.path.expanduser(os.environ.get('GPT_CACHE') or '~/.cache/gpt')
    path = os.path.join(cache, name, 'model.safetensors')
    url = f'{HUB}/openai-community/{name}/resolve/main/model.safetensors'
    sha256 = PRETRAINED[name][3]
    download({path: url}, sha256, check=lambda path: next(read_safetensors(path), None))
    return path


def tokenizer_of(folder, vocab_size):
    """The tokenizer of a model in Hugging Face's format: one that we exported, or GPT-2's."""
    exported = read_json(folder / 'meta.json').get('tokenizer')
    if exported:
        return exported
    is_gpt2 = 50257 <= vocab_size <= 50304
    for name in ('vocab.json', 'tokenizer.json'):
        if (folder / name).exists():  # 'gazed' is the last word in GPT-2's vocabulary
            vocabulary = (folder / name).read_bytes()
            is_gpt2 = is_gpt2 and bool(re.search(rb'gazed": ?50255\b', vocabulary))
    return dict(type='gpt2' if is_gpt2 else 'unknown')


def load_pretrained(source):
    """Weights in Hugging Face's format as a checkpoint: in float32, with our names and layout."""
    path = Path(find_pretrained(source) if source in PRETRAINED else source)
    files = sorted(path.glob('model*.safetensors')) or [path]  # large models have several
    if not files[0].is_file():
        raise UserError(f'{source} has no model.safetensors: name a folder that transformers or '
                        'python model.py --export_dir=FOLDER wrote')
    folder = files[0].parent
    weights = {}
    for file in files:
        for name, tensor in read_safetensors(file):
            if name.endswith(MASKS):
                continue
            if not tensor.is_floating_point():
                raise UserError(f'{file}: {name} is {tensor.dtype}, but weights must be F32, F16 '
                                'or BF16')
            if name != 'lm_head.weight':
                name = 'transformer.' + name.removeprefix('transformer.')
            if name.endswith(TRANSPOSED):
                tensor = tensor.transpose(0, -1)
            weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    try:
        wte = weights['transformer.wte.weight']
        vocab_size, n_embd = wte.shape
        block_size, _ = weights['transformer.wpe.weight'].shape
    except (KeyError, ValueError):
        names = ', '.join(weights)[:100]
        raise UserError(f'{source} is not a GPT-2: its tensors are {names}...') from None
    if not torch.equal(weights.setdefault('lm_head.weight', wte), wte):
        raise UserError(f'{source}: lm_head.weight differs from wte.weight; GPT-2 ties them')

    config = read_json(folder / 'config.json')
    n_layer = sum(name.endswith('.ln_1.weight') for name in weights)
    expected = GPT2_CONFIG | dict(n_layer=n_layer, n_embd=n_embd, n_positions=block_size,
                                  vocab_size=vocab_size)
    synonyms = dict(activation_function='gelu_pytorch_tanh', n_inner=4 * n_embd)
    for key, value in expected.items():
        if config.get(key, value) not in (value, synonyms.get(key, value)):
            raise UserError(f'{folder}/config.json says {key}={config[key]!r}, but GPT-2 with '
                            f'these weights has {value!r}')
    if 'n_head' not in config and n_embd % 64:
        raise UserError(f'{source}: n_embd={n_embd} is not a multiple of 64, so the number of '
                        'heads is unknown: add a config.json with n_head')
    model_args = dict(n_layer=n_layer, n_head=config.get('n_head', n_embd // 64), n_embd=n_embd,
                      block_size=block_size, vocab_size=vocab_size,
                      bias='transformer.ln_f.bias' in weights, dropout=0.0)
    return dict(model=weights, model_args=model_args, tokenizer=tokenizer_of(folder, vocab_size),
                chat=read_json(folder / 'meta.json').get('chat'), config={}, iter_num=0,
                best_val_loss=math.inf, path=str(files[0]))


# Our own checkpoints, and nanoGPT's

CHECKPOINT_TYPES = dict(model=dict, model_args=dict, tokenizer=dict, config=dict, iter_num=int,
                        best_val_loss=float)


def verify_archive(f):
    """Verify the tensors' checksums, which torch.load ignores."""
    if zipfile.is_zipfile(f):
        archive = zipfile.ZipFile(f)
        # torch.save never compresses (as a zip bomb would) and never marks an entry as a folder
        # (which torch.load would read as zeros)
        changed = [entry.filename for entry in archive.infolist()
                   if entry.compress_type or entry.external_attr] or archive.testzip()
        if changed:
            raise ValueError(f'modified since it was saved: {changed}')
    f.seek(0)


def is_plain(tensor):
    """Whether it is a dense, contiguous floating-point tensor on the CPU."""
    return (tensor.layout == torch.strided and tensor.device.type == 'cpu'
            and tensor.is_floating_point() and tensor.is_contiguous())


def from_nanogpt(checkpoint, path, data):
    """The entries of a nanoGPT checkpoint that differ from ours. nanoGPT does not store the
    tokenizer: it is GPT-2's, or in the dataset's meta.pkl in data, beside the checkpoint or in DATA."""
    vocab_size = checkpoint['model_args']['vocab_size']
    dataset = os.path.basename(checkpoint['config']['dataset'])
    ours = os.path.join(DATA, dataset)
    beside = path.parent / '..' / 'data' / dataset
    tokenizer = dict(type='gpt2') if vocab_size in (50257, 50304) else None
    for folder in (data, beside, ours):
        spec = nanogpt_tokenizer(folder) if folder and not tokenizer else None
        if spec and len(spec['chars']) == vocab_size:
            tokenizer = spec
    if not tokenizer:
        raise UserError(f'{path} was trained by nanoGPT on the {vocab_size} characters of dataset '
                        f'{dataset!r}, but no matching meta.pkl was found: copy the '
                        f"dataset's folder to {ours}")
    weights = {name.removeprefix('_orig_mod.'): w for name, w in checkpoint['model'].items()
               if not name.endswith('.attn.bias')}  # the mask
    optimizer = checkpoint.get('optimizer')
    return dict(model=weights, tokenizer=tokenizer, scaler={},
                best_val_loss=float(checkpoint['best_val_loss']),
                optimizer=optimizer and dict(adamw=optimizer))


def save_checkpoint(checkpoint, path):
    """Write a checkpoint so that path always holds the complete old one or the complete new one,
    even after a power cut. An OSError says why that failed."""
    folder = os.path.dirname(path) or '.'
    try:
        with open(path + '.tmp', 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.tmp', path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        free = shutil.disk_usage(folder).free if os.path.isdir(folder) else 0
        reason = str(error).splitlines()[0][:120]
        raise OSError(f'cannot save {path}, {free / 1e6:,.1f} MB free: {reason}') from None
    if os.name == 'posix':  # make the new name durable
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot do this
            os.fsync(descriptor)
        os.close(descriptor)


def load_checkpoint(source, data=None):
    """Load a checkpoint to the CPU: weights (model), model_args, tokenizer, config,
    iter_num, best_val_loss, path, the form of conversations (chat), and for resuming the
    optimizer's state.

    The source is the folder of a run (its best.pt, else ckpt.pt), a file that train.py or nanoGPT
    saved, or what from_pretrained takes. Loading it cannot run code. data is the folder of a
    dataset that may hold the characters of a nanoGPT model."""
    has_config = os.path.exists(os.path.join(source, 'config.json'))
    if source in PRETRAINED or source.endswith('.safetensors') or has_config:
        return load_pretrained(source)
    path = Path(source)
    if path.is_dir():
        best = path / 'best.pt'
        path = best if best.exists() else path / 'ckpt.pt'
    if not path.exists():
        raise UserError(f'there is no checkpoint {path}: name a run (--out_dir=FOLDER), a checkpoint or '
                        f'a model (--init_from=gpt2)')
    try:
        with open(path, 'rb') as f:
            verify_archive(f)
            checkpoint = dict(torch.load(f, map_location='cpu', weights_only=True))
        if 'tokenizer' not in checkpoint:
            checkpoint |= from_nanogpt(checkpoint, path, data)
    except UserError:
        raise
    except Exception as error:  # torch.load reports damage in many ways
        others = {*path.parent.glob('*.pt'), *path.parent.glob('earlier-*/*.pt')} - {path}
        others = ', '.join(sorted(map(str, others))) or 'none'
        reason = f'{type(error).__name__}: {str(error)[:80]}'
        raise UserError(f'{path} is damaged or not a checkpoint ({reason}); '
                        f'other checkpoints here: {others}') from error
    for key, kind in CHECKPOINT_TYPES.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(f'{path} is not a checkpoint of this code: it lacks {key!r}')
    # fused optimizers would corrupt memory with others
    if not all(is_plain(leaf) for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor)):
        raise UserError(f'{path} is damaged: its tensors are not dense floating-point numbers')
    return checkpoint | dict(path=str(path))


def from_checkpoint(checkpoint, **changes):
    """The model in a checkpoint, with changes to its config, such as another dropout."""
    args = checkpoint['model_args'] | changes
    try:
        weights = {name: w.float() for name, w in checkpoint['model'].items()}
        if args['n_layer'] > len(weights):
            raise ValueError(f"n_layer={args['n_layer']}, but only {len(weights)} tensors")
        with torch.device('meta'):  # shapes only: the weights are assigned, not copied
            model = GPT(GPTConfig(**args))
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f'the weights of this checkpoint do not fit its model_args: '
                        f'{error}') from None
    model.lm_head.weight = model.transformer.wte.weight
    return model


def from_pretrained(source, **changes):
    """OpenAI's GPT-2 ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', downloaded once), or a
    GPT-2 in Hugging Face's format: a folder or a .safetensors file."""
    return from_checkpoint(load_pretrained(source), **changes)


GPT.from_checkpoint = staticmethod(from_checkpoint)
GPT.from_pretrained = staticmethod(from_pretrained)


# Exports


def write_safetensors(tensors, path):
    """Write {name: float32 tensor} to a .safetensors file."""
    header = dict(__metadata__=dict(format='pt'))
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = dict(dtype='F32', shape=list(tensor.shape), data_offsets=[position, end])
        position = end
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)
    with open(path + '.tmp', 'wb') as f:
        f.write(len(header).to_bytes(8, 'little') + header)
        for tensor in tensors.values():
            tensor.contiguous().numpy().tofile(f)
    os.replace(path + '.tmp', path)


def to_huggingface(checkpoint, folder):
    """Write a folder that transformers loads: weights, config and tokenizer."""
    model = from_checkpoint(checkpoint)
    config = model.config
    if extensions := beyond_gpt2(config):
        raise UserError(f"GPT-2's format cannot hold a model with {', '.join(extensions)}: "
                        'train one without, or use --export_onnx=FILE')
    tok = get_tokenizer(checkpoint['tokenizer'])
    tensors = {}
    for name, w in model.named_parameters():  # names the tied matrix once, as wte
        w = w.detach()
        if name == 'transformer.wte.weight':
            w = w[:tok.n_vocab]  # without the padding
        tensors[name] = w.T if name.endswith(TRANSPOSED) else w
        if not config.bias and name.endswith(('ln_1.weight', 'ln_2.weight', 'ln_f.weight', *TRANSPOSED)):
            tensors[name.replace('weight', 'bias')] = torch.zeros(len(w))

    ends = dict(bos_token_id=tok.eot, eos_token_id=tok.eot)
    files = {
        'config.json': GPT2_CONFIG | ends | dict(
            architectures=['GPT2LMHeadModel'], dtype='float32', n_layer=config.n_layer,
            n_head=config.n_head, n_embd=config.n_embd, n_positions=config.block_size,
            n_ctx=config.block_size,  # which llama.cpp's converter reads
            vocab_size=tok.n_vocab, resid_pdrop=config.dropout, embd_pdrop=config.dropout,
            attn_pdrop=config.dropout),
        'generation_config.json': ends if tok.eot is not None else {},
        'meta.json': dict(tokenizer=checkpoint['tokenizer'], vocab_size=tok.n_vocab,
                          chat=checkpoint.get('chat')),
    }
    if isinstance(tok, BPETokenizer):
        files |= tok.huggingface_files()
    os.makedirs(folder, exist_ok=True)
    write_safetensors(tensors, os.path.join(folder, 'model.safetensors'))
    for name, content in files.items():
        Path(folder, name).write_text(json.dumps(content, indent=1), encoding='utf-8')
    print(f'wrote {folder}: model.safetensors, {", ".join(files)}')


def to_onnx(model, path):
    """Write the model as an ONNX graph from idx, of any batch size and length, to logits."""
    optional('onnxscript', 'export_onnx')
    shapes = dict(idx={0: 'batch', 1: 'time'})
    torch.onnx.export(model, (torch.zeros(2, 2, dtype=torch.long),), path, input_names=['idx'],
                      output_names=['logits'], dynamic_shapes=shapes, dynamo=True, verbose=False)
    data = f' and {path}.data' if os.path.exists(path + '.data') else ''
    print(f'wrote {path}{data}: idx (batch, time) -> logits (batch, time, vocabulary)')


# -----------------------------------------------------------------------------
# python model.py

GPU_SIZES = 8, 12, 16, 24, 40, 48, 80, 141, 192  # GB
PURPOSES = dict(
    wte='token id to vector', wpe='position to vector', drop='dropout', ln_1='normalize',
    attn='mix earlier tokens', c_attn='queries, keys, values', c_proj='back to the stream',
    ln_2='normalize', c_fc='widen', ln_f='normalize', lm_head='score every token')


def record_pass(model, *inputs):
    """Run a forward pass: {name: (arguments, output)} of every module, in order of completion."""
    names = {module: name.removeprefix('transformer.') for name, module in model.named_modules()}
    records = {}

    def record(module, args, output):
        records[names[module]] = args, output
    with nn.modules.module.register_module_forward_hook(record):
        model(*inputs)
    return records


def columns(text):
    """The width of a text in terminal columns."""
    marks = sum(unicodedata.category(c) in ('Mn', 'Me') for c in text)
    wide = sum(unicodedata.east_asian_width(c) in 'WF' for c in text)
    return len(text) - marks + wide


@torch.no_grad()
def trace_text(model, tok, text, layer, head):
    """Print a forward pass: every module's output, the attention of one head, the loss at the last
    tokens, and what the model would predict after each block. Returns the logits."""
    check(dict(layer=layer, head=head), 'layer >= 0', f'layer < {model.config.n_layer}',
          'head >= 0', f'head < {model.config.n_head}')
    ids = tok.encode(text, special=True).tolist()
    T = len(ids)
    if not 0 < T <= model.config.block_size:
        raise UserError(f'trace={text!r} has {T} tokens: use 1 to {model.config.block_size}')
    records = record_pass(model, torch.tensor([ids]))

    def show(token, width=0):
        piece = tok.decode_bytes([token]).decode('utf-8', 'replace')
        if unicodedata.category(piece[:1] or ' ').startswith('M'):
            piece = '\u25cc' + piece  # a dotted circle stands in for the missing letter
        piece = repr(piece[:width - 2] if width else piece)
        return piece + ' ' * (width - columns(piece))

    print(textwrap.fill(f'{T} tokens: {" ".join(f"{show(i)}={i}" for i in ids)}', 80))
    print(f'\n{"output of":<18}{"shape":<18}{"mean":>9}{"std":>9}    what it does')
    for name, (_, output) in records.items():
        last = name.split('.')[-1]
        purpose = 'stream after a block' if last.isdigit() else PURPOSES.get(last)
        if purpose and (name.count('.') < 2 or name.startswith(f'h.{layer}.')):
            print(f'{name:<18}{str(tuple(output.shape)):<18}{output.mean():>9.3f}'
                  f'{output.std():>9.3f}    {purpose}')

    attn = model.transformer.h[layer].attn
    x, rotation = records[f'h.{layer}.attn'][0][:2]
    q, k, _ = attn.queries_keys_values(x, rotation)  # (1, n_head, T, head size)
    scores = q[0, head] @ k[0, head].T / math.sqrt(q.shape[-1])
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    first = max(0, T - 16)  # as many as fit 80 columns
    print(f'\nlayer {layer}, head {head}: percent of attention from each token (row) to each (column),'
          f'\nfor the last {T - first} of {T} tokens\n{"":<16}' + ''.join(f'{i:>4}' for i in range(first, T)))
    for i in range(first, T):
        shares = ''.join(f'{100 * weight:>4.0f}' for weight in weights[i, first:i + 1])
        print(f'{i:>4} {show(ids[i], 11)}{shares}')

    logits = records['lm_head'][1]
    chances = logits[0, :-1].softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
    print(f'\n     {"token":<11} {"next token":<11}{"chance":>8}{"loss":>9}')
    for i in range(first, T - 1):
        print(f'{i:>4} {show(ids[i], 11)} {show(ids[i + 1], 11)}{chances[i]:>8.1%}'
              f'{-chances[i].log():>9.3f}')

    print('\nblock  norm of the stream  token after the text, if this block were the last')
    for i in range(model.config.n_layer):
        _, x = records[f'h.{i}']
        guess = model.lm_head(model.transformer.ln_f(x[0, -1]))[:tok.n_vocab]
        probs, likely = guess.softmax(-1).topk(min(4, tok.n_vocab))
        guesses = [f'{show(i)} {p:.1%}' for i, p in zip(likely.tolist(), probs, strict=True)]
        print(f'{i:>5}{x.norm(dim=-1).mean():>20.2f}  {"  ".join(guesses)}'[:80])
    return logits


def print_layout(config, batch_size, dtype):
    """Print every module with its purpose, output shape, parameters and forward FLOPs, then the
    memory that training takes. Fake tensors have no data, so any size is instant."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run_forward(recompute):
        """All outputs, and how many bytes autograd keeps for the backward pass."""
        model.recompute_activations = recompute
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor  # counts each storage once
            return tensor
        for p in model.parameters():
            keep(p)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            records = record_pass(model, idx, idx)
        return records, sum(t.untyped_storage().nbytes() for t in kept.values()) - 4 * n

    half = dtype == 'bfloat16'
    with FakeTensorMode(), torch.autocast('cpu', torch.bfloat16, enabled=half):
        model = GPT(config)
        n = model.num_params()
        idx = torch.zeros(batch_size, config.block_size, dtype=torch.long)
        records, activations = run_forward(recompute=False)
        _, outside_blocks = run_forward(recompute=True)

    tokens = batch_size * config.block_size
    print(f'{"module":<16}{"purpose":<22}{"output":<18}{"parameters":>12}{"GFLOPs":>12}')
    for name, module in model.named_modules():
        name = name.removeprefix('transformer.')
        last = name.split('.')[-1]
        if name == 'h.1':
            print(f'h.1 ... {config.n_layer - 1}: the same')
        if last not in PURPOSES or re.match(r'h\.[1-9]', name):
            continue
        count = f'{sum(p.numel() for p in module.parameters(recurse=False)):,}'
        flops = 0
        if last == 'lm_head':
            count = 'tied to wte'
        if isinstance(module, nn.Linear):
            flops = 2 * tokens * module.weight.numel()
        elif last == 'attn':  # q k^T, and its product with v
            flops = 4 * tokens * config.block_size * config.n_embd
        shape = str(tuple(records[name][1].shape))
        print(f'{name:<16}{PURPOSES[last]:<22}{shape:<18}{count:>12}{flops / 1e9:>12,.3f}')
    flops = model.flops_per_token()
    print(f'\nparameters {n:,}; a training step of {batch_size} x {config.block_size} tokens '
          f'takes {flops * tokens / 1e12:,.3f} TFLOPs')

    # recomputing keeps the input of every block, and the activations of one block at a time
    one_block = (activations - outside_blocks) / config.n_layer
    inputs = 4 * tokens * config.n_embd * config.n_layer
    print(f'\nmemory to train on this batch in {dtype}, in MB, at least')
    print(f'{"":<28}{"weights":>9}{"grads":>9}{"AdamW":>9}{"activ.":>9}{"total":>9}  GPU')
    for label, activ in (('', activations),
                         ('activation_checkpointing', outside_blocks + one_block + inputs)):
        memory = [4 * n, 4 * n, 8 * n, activ]
        memory.append(sum(memory))
        card = next((f'{gb} GB' for gb in GPU_SIZES if memory[-1] < 0.9e9 * gb), 'none')
        print(f'{label:<28}' + ''.join(f'{m / 1e6:>9,.1f}' for m in memory) + f'  {card}')
    print('parallel=fsdp divides weights, grads and AdamW by the number of GPUs')


if __name__ == '__main__':
    init_from = ''      # model to show or export: a run's folder, a checkpoint, gpt2-xl; '': random
    trace = ''          # text to follow through the model, step by step
    layer = 0           # trace: layer whose attention to show
    head = 0            # trace: head of that layer
    export_dir = ''     # folder to write for Hugging Face's transformers
    export_onnx = ''    # file to write for ONNX runtimes
    batch_size = 8      # sequences in the batch whose memory is estimated
    dtype = 'bfloat16'  # of the activations in that estimate: bfloat16 or float32
    globals().update(vars(GPTConfig()))
    settings = configure(globals())
    check(settings, 'batch_size > 0', "dtype in ('float32', 'bfloat16')")
    if (trace or export_dir or export_onnx) and not init_from:
        raise UserError('name a model: add --init_from=out-mine, for example')
    config = config_from_settings(settings)

    if export_dir:
        to_huggingface(load_checkpoint(init_from), export_dir)
    if export_onnx:
        to_onnx(from_checkpoint(load_checkpoint(init_from), dropout=0.0).eval(), export_onnx)
    if export_dir or export_onnx:
        sys.exit()

    if trace:
        checkpoint = load_checkpoint(init_from)
        tok = get_tokenizer(checkpoint['tokenizer'])
        trace_text(from_checkpoint(checkpoint).eval(), tok, trace, layer, head)
    else:
        if init_from in PRETRAINED:  # known without downloading the weights
            n_layer, n_head, n_embd, _ = PRETRAINED[init_from]
            config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        elif init_from:
            config = from_checkpoint(load_checkpoint(init_from)).config
        print_layout(config, batch_size, dtype)
