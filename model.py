"""
A GPT in plain PyTorch: GPT-2 by default, its modern descendants by settings.

First the network: attention, where tokens exchange information; the MLP, where
each token is processed alone; the block, which holds both; and the model, which
stacks blocks between an embedding and a head. Then optimizers, fast layers for
CPUs, checkpoints in and out. Run it to see a model laid out:

$ python model.py                                  # GPT-2 124M
$ python model.py --init_from=out-shakespeare --trace="To be" --layer=1 --head=1
$ python model.py --init_from=out-plain --export_dir=out-plain-hf
"""
import ctypes
import json
import logging
import math
import os
import platform
import re
import warnings
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from configurator import UserError, check, configure, optional, writing
from prepare import DATA, HUB, BPETokenizer, download, get_tokenizer, nanogpt_tokenizer, read_json

# -----------------------------------------------------------------------------
# the network


@dataclass
class GPTConfig:
    block_size: int = 1024    # longest sequence of tokens that the model can see
    vocab_size: int = 50257
    n_layer: int = 12         # number of blocks
    n_head: int = 12          # attention heads in each block
    n_embd: int = 768         # width: size of the vector that describes each token
    dropout: float = 0.0
    bias: bool = True         # biases in linear layers and LayerNorms, as in GPT-2
    rope: bool = False        # rotary positions instead of learned position embeddings
    qk_norm: bool = False     # normalize queries and keys: stable at high learning rates
    activation: str = 'gelu'  # nonlinearity of the MLP: 'gelu' or 'relu2'

    def __post_init__(self):
        check(vars(self), 'block_size > 0', 'vocab_size > 0', 'n_layer > 0', 'n_head > 0', 'n_embd > 0',
              'dropout >= 0', 'dropout < 1', f'activation in {tuple(ACTIVATIONS)}')
        multiple = 2 * self.n_head if self.rope else self.n_head  # rope rotates pairs of channels
        if self.n_embd % multiple:
            raise UserError(f'n_embd={self.n_embd} is not divisible by {multiple}: change it or n_head')


def config_from_settings(settings, **changes):
    """The GPTConfig that a script's settings describe."""
    return GPTConfig(**{f.name: settings[f.name] for f in fields(GPTConfig) if f.name in settings} | changes)


class KVCache:
    """The keys and values of one layer for the tokens so far, so that a step of generation computes
    one token. A prompt comes first, then one token at a time."""

    def __init__(self, config, rows, length, weight):
        dtype = torch.float32 if weight.device.type == 'cpu' else weight.dtype  # faster attention
        self.kv = weight.new_zeros(2, rows, config.n_head, length, config.n_embd // config.n_head,
                                   dtype=dtype)
        self.length = 0

    def append(self, k, v):
        """Store new keys and values, (rows, n_head, T, head size), and return all so far."""
        start = self.length
        self.length += k.shape[2]
        self.kv[0, :, :, start:self.length] = k
        self.kv[1, :, :, start:self.length] = v
        return self.kv[:, :, :, :self.length]


def rotate(x, rotation):
    """Rotary positions: rotate each pair (x[i], x[i + half]) of a query or key by an angle
    proportional to its position. The product q k then depends on positions only through the
    distance between the two tokens."""
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

    def forward(self, x, rotation=None, cache=None):
        q, k, v = self.queries_keys_values(x, rotation)
        causal = cache is None or q.shape[2] > 1  # a single token sees all that are cached
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, dropout_p=dropout, is_causal=causal)
        y = y.type_as(q).transpose(1, 2).reshape(x.shape)  # (B, T, C): the heads side by side again
        return self.resid_dropout(self.c_proj(y))


ACTIVATIONS = dict(
    gelu=lambda x: F.gelu(x, approximate='tanh'),
    relu2=lambda x: F.relu(x).square(),
)


class MLP(nn.Module):
    """Processes each token independently: expand it to four times its width, apply a nonlinearity,
    project it back. GELU is a smooth ReLU: x times the probability that a normal variable is
    below x. An inactive unit still gets some gradient."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.activate = ACTIVATIONS[config.activation]

    def forward(self, x):
        x = self.activate(self.c_fc(x))  # (B, T, 4C)
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
        y = self.attn(self.ln_1(x), *context)
        x = x.type_as(y) + y  # keep the stream in autocast's dtype: half the memory traffic
        return x + self.mlp(self.ln_2(x))


class MeanLoss(torch.autograd.Function):
    """The mean of -log p(target) where targets are not -1: logits (N, vocab_size) -> a number. With
    a large vocabulary nothing takes more memory than logits in float32, so convert 32 MB at a time."""

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        ctx.rows = 2**23 // logits.shape[1] + 1
        total = 0
        for part, target in zip(logits.split(ctx.rows), targets.split(ctx.rows), strict=True):
            total += F.cross_entropy(part.float(), target, ignore_index=-1, reduction='sum')
        return total / (targets >= 0).sum().clamp(min=1)

    @staticmethod
    def backward(ctx, grad):
        """The gradient of one token's loss is its probabilities, minus 1 at the target."""
        logits, targets = ctx.saved_tensors
        counted = targets >= 0
        scale = counted * grad / counted.sum().clamp(min=1)
        gradient = torch.empty_like(logits)
        for start in range(0, len(logits), ctx.rows):
            part = slice(start, start + ctx.rows)
            p = logits[part].float().softmax(dim=-1)
            p[torch.arange(len(p), device=p.device), targets[part]] -= 1
            gradient[part] = p.mul_(scale[part, None])
        return gradient, None


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


class GPT(nn.Module):
    """Token ids in; out, at every position, a score (logit) for each possible next token."""
    recompute_activations = False  # recompute blocks in the backward pass: less memory, slower

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

    def hidden(self, idx, cache=None):
        """Map ids (B, T) to the final hidden states (B, T, C). A cache, one KVCache for each block,
        holds the tokens before idx; idx is added to it."""
        T = idx.shape[1]
        start = 0 if cache is None else cache[0].length
        assert start + T <= self.config.block_size, f'{start + T} tokens exceed block_size'
        position = torch.arange(start, start + T, device=idx.device)

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
                x = block(x, rotation, None if cache is None else cache[i])
        return self.transformer.ln_f(x)

    def score(self, x, targets):
        """Hidden states to (logits, loss). A compiled step returns no logits: as an output they
        would be kept, and so would a gradient of their size."""
        logits = self.lm_head(x)
        rows, targets = logits.flatten(0, 1), targets.flatten()
        if torch.compiler.is_compiling():  # the compiler fuses these steps
            total = F.cross_entropy(rows.float(), targets, ignore_index=-1, reduction='sum')
            return None, total / (targets >= 0).sum().clamp(min=1)
        return logits, MeanLoss.apply(rows, targets)

    def forward(self, idx, targets=None):
        """Ids (B, T) to (logits (B, T, vocab_size), loss). The loss is the mean of
        -log p(target) and ignores targets of -1; without targets it is None."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        return self.score(x, targets)

    def compile_blocks(self):
        """Compile the blocks, which are alike and share one compilation, and the loss."""
        for block in self.transformer.h:
            block.compile()
        self.score = torch.compile(self.score)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
        """Continue each row of idx (B, T): yields the next token of every row, (B,), max_new_tokens
        times. Ids from vocab_size up (padding) are never chosen. When the cache is full, it starts
        again with the more recent half of the window."""
        assert not self.training, 'call model.eval() first: dropout is on'
        block_size = self.config.block_size
        length = min(block_size, idx.shape[1] + max_new_tokens)
        window = idx[:, -block_size:]
        cache = None
        for _ in range(max_new_tokens):
            if window.shape[1] > block_size:
                window = window[:, -max(1, block_size // 2):]
                cache = None
            new = window[:, -1:]
            if cache is None:
                cache = [KVCache(self.config, len(idx), length, self.transformer.wte.weight)
                         for _ in self.transformer.h]
                new = window
            # without cuDNN, which plans anew for every length
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                logits = self.lm_head(self.hidden(new, cache)[:, -1])
            token = sample_token(logits[:, :vocab_size], temperature, top_k, top_p)
            yield token
            window = torch.cat((window, token[:, None]), dim=1)

    def generate(self, idx, max_new_tokens, **options):
        """Continue each row of idx: (B, T) -> (B, T + max_new_tokens). Options are those of stream."""
        tokens = self.stream(idx, max_new_tokens, **options)
        return torch.cat((idx, *(token[:, None] for token in tokens)), dim=1)

    @classmethod
    def from_pretrained(cls, source, **changes):
        """OpenAI's GPT-2 ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', downloaded once), a run's
        folder, a checkpoint, or a GPT-2 in Hugging Face's format: a folder or .safetensors file."""
        return cls.from_checkpoint(load_checkpoint(source), **changes)

    @classmethod
    def from_checkpoint(cls, checkpoint, **changes):
        """The model in a checkpoint, with changes to its config: a dropout, a smaller block_size."""
        try:
            config = GPTConfig(**checkpoint['model_args'] | changes)
            weights = {name: w.float() for name, w in checkpoint['model'].items()}
            if not config.rope:
                weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:config.block_size]
            with torch.device('meta'):  # shapes only: the weights are assigned, not copied
                model = cls(config)
            model.load_state_dict(weights, assign=True)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f'the weights do not fit the model_args of this checkpoint: {error}') from None
        model.lm_head.weight = model.transformer.wte.weight
        return model

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # counts the tied matrix once

    def flops_per_token(self):
        """Floating point operations to train on one token. The forward pass takes 2 for each
        weight of a matrix, and 4 T C in each layer for attention (as if it were not causal).
        The backward pass takes twice as many."""
        matrices = [p for name, p in self.named_parameters() if p.dim() == 2 and 'wpe' not in name]
        attention = self.config.n_layer * self.config.n_embd * self.config.block_size
        return 6 * sum(p.numel() for p in matrices) + 12 * attention


# dense bfloat16 peak (float16 on older cards) in TFLOPS, from the data sheets; the first match wins
PEAK_TFLOPS = {
    'B200': 2250, 'GH200': 989, 'H200': 989, 'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989, 'A100': 312,
    'L40S': 362, 'L4': 121, 'V100': 125, 'T4': 65, 'RTX 5090': 209, 'RTX 4090': 165, 'RTX 3090': 71,
}


def peak_flops(device, dtype):
    """The device's peak FLOPs per second, or None where unknown."""
    if device.startswith('cuda') and dtype != 'float32':
        card = torch.cuda.get_device_name(device)
        matches = (tflops for name, tflops in PEAK_TFLOPS.items() if re.search(rf'\b{name}\b', card))
        return 1e12 * next(matches, 0) or None


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
    only the few that dominate the gradient. The matrices of a group have the same shape. parts:
    how many independent matrices are stacked in each (c_attn holds three)."""

    def __init__(self, groups, lr, weight_decay, momentum):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
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
    """[AdamW for all parameters]; with kind='muon' also Muon, which takes the blocks' matrices.
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
    optimizers = [torch.optim.AdamW(groups, learning_rate, betas, fused=True)]
    if muon_groups:
        optimizers.append(Muon(muon_groups, learning_rate, weight_decay, momentum=betas[0]))
    return optimizers


# -----------------------------------------------------------------------------
# Speed on a CPU. Generating a token reads every weight, so reading takes the time.


def keep_memory():
    """Make the C library keep freed memory for the next tensors. By default it returns large blocks
    to the system, which zeroes them on reuse. That costs a third of a GPT-2 training step on a CPU."""
    if platform.system() == 'Linux' and platform.libc_ver()[0] == 'glibc':
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


class PackedLinear(nn.Module):
    """A linear layer whose weights lie in memory in the order in which oneDNN reads them."""

    def __init__(self, linear):
        super().__init__()
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights that also rounds activations to 8 bits and multiplies
    integers. FBGEMM rounds all rows of its input in steps of one size, so rows are first scaled
    to the same size: a large one would turn the others into zeros."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30)  # of each row
        steps = (weight / scale[:, None]).round().to(torch.int8)
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


def optimize_for_generation(model, int8=False):
    """Replace linear layers with faster ones where the CPU has them, which cannot be trained."""
    weight = model.lm_head.weight
    supported = weight.device.type == 'cpu' and platform.machine() in ('x86_64', 'AMD64')
    if int8 and not (supported and torch.cpu._is_vnni_supported()):
        raise UserError("quantize='int8' needs a CPU with VNNI instructions: leave it out")
    if weight.dtype == torch.bfloat16 and not int8:
        supported = supported and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    linear_class = Int8Linear if int8 else PackedLinear
    if supported:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, linear_class(child))


# -----------------------------------------------------------------------------
# Checkpoints: weights from any source become the same kind of dict. First Hugging Face's format.

PRETRAINED = {  # sha256 of the file where known
    'gpt2': '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707',
    'gpt2-medium': 'fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd',
    'gpt2-large': None,
    'gpt2-xl': None,
}
TRANSPOSED = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')  # stored that way in the file
GPT2_CONFIG = dict(  # what a GPT-2's config.json says, explicitly or by default
    model_type='gpt2', activation_function='gelu_new', layer_norm_epsilon=1e-5, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True, add_cross_attention=False)
SAFETENSORS_DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
                          U8=torch.uint8, BOOL=torch.bool)


def read_safetensors(path):
    """Yield (name, tensor) from a .safetensors file: the length of the header, the header as
    JSON, and the tensors' bytes."""
    with open(path, 'rb') as f:
        header_size = int.from_bytes(f.read(8), 'little')
        header = json.loads(f.read(header_size))
    header.pop('__metadata__', None)
    data = np.memmap(path, np.uint8, 'c', 8 + header_size)
    for name, entry in header.items():
        begin, end = entry['data_offsets']
        tensor = torch.from_numpy(data[begin:end]).view(SAFETENSORS_DTYPES[entry['dtype']])
        yield name, tensor.view(entry['shape'])


def load_pretrained(source):
    """Weights in Hugging Face's format as a checkpoint: in float32, with our names and layout.
    OpenAI's are downloaded once, to GPT_CACHE."""
    path = Path(source)
    if source in PRETRAINED:
        path = Path(os.environ.get('GPT_CACHE') or '~/.cache/gpt', source, 'model.safetensors').expanduser()
        url = f'{HUB}/openai-community/{source}/resolve/main/model.safetensors'
        download(url, str(path), PRETRAINED[source])
    files = sorted(path.glob('model*.safetensors')) or [path]  # large models have several
    if not files[0].is_file():
        raise UserError(f'{source} has no model.safetensors: name a folder that transformers or '
                        'python model.py --export_dir=FOLDER wrote')
    folder = files[0].parent
    config = read_json(folder / 'config.json')
    for key, value in GPT2_CONFIG.items():
        if config.get(key, value) not in (value, 'gelu_pytorch_tanh'):  # which is gelu_new
            raise UserError(f'{folder}/config.json says {key}={config[key]!r}, but GPT-2 has {value!r}')
    weights = {}
    try:
        for file in files:
            for name, tensor in read_safetensors(file):
                if name != 'lm_head.weight':
                    name = 'transformer.' + name.removeprefix('transformer.')
                if name.endswith(TRANSPOSED):
                    tensor = tensor.transpose(0, -1)
                if not name.endswith(('.attn.bias', '.attn.masked_bias')):  # masks in old files
                    weights[name] = tensor.to(torch.float32, copy=True,
                                              memory_format=torch.contiguous_format)
        vocab_size, n_embd = weights['transformer.wte.weight'].shape
        block_size, _ = weights['transformer.wpe.weight'].shape
    except Exception as error:  # damage shows in many ways
        raise UserError(f'{source} is damaged or not a GPT-2 ({error!r}): replace it') from None
    weights['lm_head.weight'] = weights['transformer.wte.weight']  # GPT-2 ties them
    model_args = dict(n_layer=sum(name.endswith('.ln_1.weight') for name in weights),
                      n_head=config.get('n_head', n_embd // 64), n_embd=n_embd, block_size=block_size,
                      vocab_size=vocab_size, bias='transformer.ln_f.bias' in weights)
    exported = read_json(folder / 'meta.json')  # if this code wrote the folder
    tokenizer = dict(type='gpt2' if 50257 <= vocab_size <= 50304 else 'unknown')
    return dict(model=weights, model_args=model_args, tokenizer=exported.get('tokenizer', tokenizer),
                chat=exported.get('chat'), path=str(files[0]))


def from_nanogpt(checkpoint, path):
    """The entries of a nanoGPT checkpoint that differ from ours. It does not store the tokenizer:
    that is GPT-2's, or in the dataset's meta.pkl, in DATA or beside the checkpoint."""
    vocab_size = checkpoint['model_args']['vocab_size']
    dataset = os.path.basename(checkpoint['config']['dataset'])
    ours = os.path.join(DATA, dataset)
    tokenizer = dict(type='gpt2')
    if vocab_size not in (50257, 50304):
        tokenizer = nanogpt_tokenizer(ours) or nanogpt_tokenizer(path.parent / '../data' / dataset)
        if not tokenizer or len(tokenizer['chars']) != vocab_size:
            raise UserError(f'{path} was trained by nanoGPT on the {vocab_size} characters of {dataset!r}, '
                            f'but no matching meta.pkl was found: copy the folder of that dataset to {ours}')
    weights = {name.removeprefix('_orig_mod.'): w for name, w in checkpoint['model'].items()
               if not name.endswith('.attn.bias')}  # the mask
    # its optimizer numbers the parameters: matrices, then vectors, without the tied head
    names = [name for name in weights if name != 'lm_head.weight']
    names.sort(key=lambda name: weights[name].dim() < 2)
    state = {names[i]: entries for i, entries in checkpoint['optimizer']['state'].items()}
    return dict(model=weights, tokenizer=tokenizer, optimizer=state)


def load_checkpoint(source, verify=True):
    """Load a checkpoint to the CPU: the weights (model), model_args, tokenizer, and what train.py
    needs to resume. The source is the folder of a run (its best.pt, else ckpt.pt), a file that
    train.py or nanoGPT saved, or what from_pretrained takes. Loading it cannot run code. With
    verify it reads the file once more, to find flipped bits."""
    path = Path(source)
    exported = (path / 'config.json').exists() and not (path / 'ckpt.pt').exists()
    if source in PRETRAINED or path.suffix == '.safetensors' or exported:
        return load_pretrained(source)
    if path.is_dir():
        path = path / ('best.pt' if (path / 'best.pt').exists() else 'ckpt.pt')
    if not path.exists():
        raise UserError(f'there is no checkpoint {path}: train first, or name a run (--out_dir=FOLDER) or '
                        f'a model (--init_from=gpt2)')
    try:
        if verify and (changed := zipfile.ZipFile(path).testzip()):
            raise ValueError(f'{changed} has changed since it was saved')  # torch.load would not notice
        # map the file: all processes share one copy. Windows cannot replace a mapped file
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=os.name == 'posix')
        if 'model_args' not in checkpoint:
            raise ValueError('it has no model_args')
    except Exception as error:  # torch.load reports damage in many ways
        raise UserError(f'{path} is damaged or not a checkpoint ({str(error)[:80]}): '
                        'use another, such as ckpt.pt, best.pt or those in earlier-1') from None
    if 'tokenizer' not in checkpoint:
        checkpoint |= from_nanogpt(checkpoint, path)
    return checkpoint | dict(path=str(path))


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
    with writing(path) as f:
        f.write(len(header).to_bytes(8, 'little') + header)
        for tensor in tensors.values():
            f.write(tensor.contiguous().numpy().data)


def to_huggingface(checkpoint, folder):
    """Write a folder that transformers loads: weights, config and tokenizer."""
    model = GPT.from_checkpoint(checkpoint)
    config = model.config
    for f in fields(config)[7:]:  # the others are GPT-2's
        if getattr(config, f.name) != f.default:
            raise UserError(f"GPT-2's format cannot hold {f.name}={getattr(config, f.name)!r}: train "
                            f'with {f.name}={f.default!r}, or use --export_onnx=FILE')
    tok = get_tokenizer(checkpoint['tokenizer'])
    tensors = {}
    for name, w in model.named_parameters():  # names the tied matrix once, as wte
        w = w.detach()
        if name == 'transformer.wte.weight':
            w = w[:tok.n_vocab]  # without the padding
        tensors[name] = w.T if name.endswith(TRANSPOSED) else w
        if not config.bias and name.endswith(('ln_1.weight', 'ln_2.weight', 'ln_f.weight', *TRANSPOSED)):
            tensors[name.replace('weight', 'bias')] = torch.zeros(len(w))

    files = {
        'config.json': GPT2_CONFIG | dict(
            architectures=['GPT2LMHeadModel'], dtype='float32', n_layer=config.n_layer,
            n_head=config.n_head, n_embd=config.n_embd, n_positions=config.block_size,
            n_ctx=config.block_size,  # which llama.cpp's converter reads
            vocab_size=tok.n_vocab, bos_token_id=tok.eot, eos_token_id=tok.eot),
        'meta.json': dict(tokenizer=checkpoint['tokenizer'], chat=checkpoint.get('chat')),
    }
    if isinstance(tok, BPETokenizer):
        files |= tok.huggingface_files()
    os.makedirs(folder, exist_ok=True)
    write_safetensors(tensors, os.path.join(folder, 'model.safetensors'))
    for name, content in files.items():
        with writing(os.path.join(folder, name)) as f:
            f.write(json.dumps(content, indent=1).encode())
    print(f'wrote {folder}: model.safetensors, {", ".join(files)}')


def to_onnx(model, path, n_vocab):
    """Write the model, cut to n_vocab tokens, as an ONNX graph from idx of any batch size and length."""
    optional('onnxscript', 'export_onnx')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    weight = nn.Parameter(model.lm_head.weight[:n_vocab].detach())
    model.lm_head.weight = model.transformer.wte.weight = weight
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)  # it is talkative
    warnings.simplefilter('ignore', FutureWarning)
    torch.onnx.export(model, (torch.zeros(2, 2, dtype=torch.long),), path, input_names=['idx'],
                      output_names=['logits'], dynamic_shapes=dict(idx={0: 'batch', 1: 'time'}),
                      dynamo=True, verbose=False)
    print(f'wrote {path} (large weights lie beside it): idx (batch, time) -> logits')


# -----------------------------------------------------------------------------
# python model.py

PURPOSES = dict(
    wte='token id to vector', wpe='position to vector', drop='dropout', ln_1='normalize',
    attn='mix earlier tokens', c_attn='queries, keys, values', c_proj='back to the stream',
    ln_2='normalize', c_fc='widen', ln_f='normalize', lm_head='score every token')


@torch.no_grad()
def show_pass(model, idx, layer=0):
    """Run a forward pass, and print the modules outside the blocks and in one of them. Returns
    {name: (module, arguments, output)} of all, in order of completion."""
    names = {module: name.removeprefix('transformer.') for name, module in model.named_modules()}
    records = {}

    def record(module, args, output):
        records[names[module]] = module, args, output
    with nn.modules.module.register_module_forward_hook(record):
        model(idx)
    print(f'{"module":<18}{"what it does":<22}{"output":<20}{"parameters":>12}{"std":>8}')
    for name, (module, _, output) in records.items():
        purpose = PURPOSES.get(name.split('.')[-1])
        if purpose and (name.count('.') < 2 or name.startswith(f'h.{layer}.')):
            count = sum(p.numel() for p in module.parameters(recurse=False))
            std = '' if output.is_meta else f'{output.std():>8.3f}'
            print(f'{name:<18}{purpose:<22}{str(tuple(output.shape)):<20}{count:>12,}{std}')
    return records


@torch.no_grad()
def trace_text(model, tok, text, layer, head):
    """Print a forward pass: every module's output, the attention of one head, the loss at the last
    tokens, and what the model would predict after each block. Returns the logits."""
    ids = tok.encode(text, special=True).tolist()[-model.config.block_size:]
    T = len(ids)
    records = show_pass(model, torch.tensor([ids]), layer)

    def show(token):
        return repr(tok.decode_bytes([token]).decode('utf-8', 'replace'))[:11]

    attn, args, _ = records[f'h.{layer}.attn']
    q, k, _ = attn.queries_keys_values(*args[:2])
    scores = q[0, head] @ k[0, head].T / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(dim=-1)
    last = range(max(0, T - 16), T)  # as many tokens as fit 80 columns
    print(f'\nlayer {layer}, head {head}, last {len(last)} tokens: percent of attention from row to column'
          + '\n' + ' ' * 16 + ''.join(f'{i:>4}' for i in last))
    for i in last:
        shares = ''.join(f'{100 * weight:>4.0f}' for weight in weights[i, last[0]:i + 1])
        print(f'{i:>4} {show(ids[i]):<11}{shares}')

    logits = records['lm_head'][2]
    print(f'\n     {"token":<11} {"next token":<11}{"chance":>8}{"loss":>9}')
    for i in last[:-1]:
        log_p = logits[0, i].log_softmax(-1)[ids[i + 1]]
        print(f'{i:>4} {show(ids[i]):<11} {show(ids[i + 1]):<11}{log_p.exp():>8.1%}{-log_p:>9.3f}')

    print('\nblock  norm of the stream  token after the text, if this block were the last')
    for i in range(model.config.n_layer):
        x = records[f'h.{i}'][2]
        probs = model.lm_head(model.transformer.ln_f(x[0, -1]))[:tok.n_vocab].softmax(-1)
        likely = probs.topk(min(4, tok.n_vocab)).indices.tolist()
        guesses = '  '.join(f'{show(j)} {probs[j]:.1%}' for j in likely)
        print(f'{i:>5}{x.norm(dim=-1).mean():>20.2f}  {guesses}')
    return logits


def print_layout(config, batch_size):
    """Print every module, then the FLOPs and the memory that training takes. Tensors on the meta
    device have no data, so any size is instant."""
    with torch.device('meta'):
        model = GPT(config)
        show_pass(model, torch.zeros(batch_size, config.block_size, dtype=torch.long))
    n = model.num_params()
    tflops = model.flops_per_token() * batch_size * config.block_size / 1e12
    print('\nThe other blocks are like h.0; lm_head shares its weights with wte.\n'
          f'{n:,} parameters; training on {batch_size} x {config.block_size} tokens: {tflops:,.1f} TFLOPs\n'
          f'MB of memory: weights {4 * n / 1e6:,.0f}, gradients {4 * n / 1e6:,.0f}, '
          f'AdamW {8 * n / 1e6:,.0f}, and activations')


if __name__ == '__main__':
    init_from = ''    # model to show or export: a run's folder, a checkpoint, gpt2-xl; '': random
    trace = ''        # text to follow through the model, step by step
    layer = 0         # trace: layer whose attention to show
    head = 0          # trace: head of that layer
    export_dir = ''   # folder to write for Hugging Face's transformers
    export_onnx = ''  # file to write for ONNX runtimes
    batch_size = 8    # sequences in a training step
    globals().update(vars(GPTConfig()))
    settings = configure(globals())
    config = config_from_settings(settings)
    if init_from:
        checkpoint = load_checkpoint(init_from)
        model = GPT.from_checkpoint(checkpoint, dropout=0.0).eval()
        config = model.config
    elif trace or export_dir or export_onnx:
        raise UserError('name a model: add --init_from=out-mine, for example')

    if export_dir:
        to_huggingface(checkpoint, export_dir)
    elif export_onnx:
        to_onnx(model, export_onnx, get_tokenizer(checkpoint['tokenizer']).n_vocab)
    elif trace:
        check(settings, f'layer in range({config.n_layer})', f'head in range({config.n_head})')
        trace_text(model, get_tokenizer(checkpoint['tokenizer']), trace, layer, head)
    else:
        print_layout(config, batch_size)
