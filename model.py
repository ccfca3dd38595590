"""
A GPT in plain PyTorch: GPT-2 exactly by default, its modern descendants by flags. Read it from top to bottom:
attention, where tokens exchange information, the MLP, where each thinks for itself, the block that holds both, and
the model that stacks blocks between an embedding and a head. Run it to see a model laid out, module by module:

$ python model.py                                       # GPT-2 124M
$ python model.py --n_layer=24 --n_head=16 --n_embd=1024 --batch_size=4
$ python model.py --init_from=gpt2-xl --batch_size=1             # what it takes to train
$ python model.py --init_from=out-shakespeare --trace="To be" --layer=1 --head=2   # a text on its way through a model
$ python model.py --init_from=out-mine --export_dir=out-mine-hf  # write it for Hugging Face's transformers
"""
import json
import math
import os
import re
import sys
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from configurator import UserError, check, configure, optional
from prepare import DATA, HUB, BPETokenizer, download, get_tokenizer, nanogpt_tokenizer, read_json


@dataclass
class GPTConfig:
    block_size: int = 1024    # the longest window of tokens that the model can look at
    vocab_size: int = 50257   # how many different tokens there are
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768         # width: how many numbers describe a token inside the model
    dropout: float = 0.0
    bias: bool = True         # biases in linear layers and LayerNorms, as in GPT-2; without is as good and faster
    rope: bool = False        # rotary positions in attention instead of learned position embeddings
    qk_norm: bool = False     # normalise queries and keys: attention stays calm at high learning rates
    relu2: bool = False       # squared ReLU in the MLP instead of GELU: cheaper, as good

    def __post_init__(self):
        check(vars(self), 'block_size > 0', 'vocab_size > 0', 'n_layer > 0', 'n_head > 0', 'n_embd > 0', 'dropout >= 0',
              'dropout < 1')
        step = self.n_head * (2 if self.rope else 1)
        if self.n_embd % step:
            needed = f'2 x n_head={self.n_head}, as rope turns pairs' if self.rope else f'n_head={self.n_head}'
            raise UserError(f'n_embd={self.n_embd} is not divisible by {needed}: each head takes an equal share, so '
                            f'use n_embd={math.ceil(self.n_embd / step) * step}')


def rotate(x, rotation):
    """Rotary positions: turn each pair (x[i], x[i + half]) of a query or key by an angle proportional to its position,
    so that the dot product of a query and a key depends on how far apart their tokens stand, and not on where."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    """The one place where tokens look at each other. Each token asks a question (query); it and every token before it
    offer a label (key) and a content (value). How well query and key match decides how much of the value flows:
    softmax(q k^T / sqrt(head size)) v, where the softmax makes shares of the matches, which add up to 1. Several heads
    do this side by side, each in its own share of the channels, as one may look for the verb and another for a name."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys and values at once
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout, self.qk_norm = config.n_head, config.dropout, config.qk_norm

    def forward(self, x, rotation=None, cache=None, position=None, mask=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, T, head size)
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:  # generating: remember these keys and values, look back at all of them so far
            cache[0, :, :, position], cache[1, :, :, position] = k, v
            k, v = cache
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0,
                                           is_causal=mask is None)  # (B, heads, T, head size)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads' results side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token by itself: widen four times, bend, narrow again. Most of what a GPT knows sits in these weights.
    Without the bend two matrices would be one: GELU(x) = x * P(a normal number < x) is ReLU with its corner rounded
    off, so that a unit that is off still gets a little gradient."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.relu2 = config.relu2

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.relu(x).square() if self.relu2 else F.gelu(x, approximate='tanh')
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP. Both read a normalised copy of the stream and add what they found to it: the stream itself
    runs straight from embedding to head, and so do gradients on their way back, however many blocks there are.
    LayerNorm gives each token's vector mean 0 and standard deviation 1, then a weight (and bias) for each channel:
    whatever has been added so far, the next module sees numbers of the same size."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, *context):
        x = x + self.attn(self.ln_1(x), *context)  # (B, T, C): each token gathers from the ones before it
        x = x + self.mlp(self.ln_2(x))             # (B, T, C): each token digests what it gathered
        return x


def call(module, *inputs):
    return module(*inputs)


class GPT(nn.Module):
    """Token ids in, for every position a score (logit) for each possible next token out. An id picks a row of the
    embedding, the position adds another (or rotates queries and keys), blocks work on this stream, and the head
    compares what has become of it with every row of the same embedding."""
    recompute = False  # True: the backward pass computes blocks again instead of keeping all of their insides

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
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: what reads a token in also scores it going out
        for name, p in self.named_parameters():  # GPT-2's initialisation
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # what adds to the stream starts smaller, so that all blocks together add up to one
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)

    def hidden(self, idx, cache=None, start=0, run=call):
        """Ids (B, T), the first of them at position start, to the final normalised stream (B, T, C). With a cache, the
        tokens before start are in it, and these join them."""
        T, size = idx.shape[1], self.config.block_size
        length = T if cache is None else cache[0].shape[-2]
        assert length <= size, f'{length} tokens do not fit block_size={size}'
        position = start + torch.arange(T, device=idx.device)
        mask = None if cache is None else torch.arange(length, device=idx.device) <= position[:, None]  # (T, length)
        x, rotation = self.transformer.wte(idx), None  # (B, T, C)
        if self.config.rope:
            half = self.config.n_embd // self.config.n_head // 2
            speed = 10000 ** (-torch.arange(half, device=idx.device) / half)
            angle = position[:, None] * speed  # (T, hs / 2): fast pairs tell neighbours apart, slow ones pages
            rotation = angle.cos(), angle.sin()
        else:
            x = x + self.transformer.wpe(position)
        x = self.transformer.drop(x)
        if self.recompute and torch.is_grad_enabled():
            run = partial(activation_checkpoint, use_reentrant=False)
        for i, block in enumerate(self.transformer.h):
            x = run(block, x, rotation, None if cache is None else cache[i], position, mask)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Ids (B, T) to (logits (B, T, vocab_size), loss). The loss is the mean of -log p(target), where targets of
        -1 don't count, and None without targets."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def empty_cache(self, batch_size, length):
        """Room for each layer's keys and values of so many tokens, for hidden()."""
        shape = 2, batch_size, self.config.n_head, length, self.config.n_embd // self.config.n_head
        return [self.transformer.wte.weight.new_zeros(shape) for _ in self.transformer.h]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None, compile=False):
        """Continue each row of idx (B, T): yields the next token of every row, (B,), max_new_tokens times. temperature
        0 takes the likeliest, top_k keeps the k likeliest, top_p the fewest that hold that much probability together.
        Ids from vocab_size up (padding) are never emitted.

        Keys and values of the tokens so far are cached, so a step costs one token. When the window of block_size is
        full, the more recent half of it is read anew as the start of the next window, and so on. On CUDA, and with
        compile, all steps of one token have the same shapes, on a cache of full length."""
        assert not self.training, 'call model.eval() first: dropout is on'
        size, batch, device = self.config.block_size, len(idx), idx.device
        cache = self.empty_cache(batch, min(size, idx.shape[1] + max_new_tokens))
        run = torch.compile(call) if compile else call

        def step(token, position):  # (B, 1), () -> (B, vocab_size)
            return run(self.lm_head, self.hidden(token, cache, position, run)[:, -1])

        window = unread = idx[:, -size:]
        start, take = 0, None
        for _ in range(max_new_tokens):
            if start + unread.shape[1] > size:
                unread, start = window[:, -max(1, size // 2):], 0
            end = start + unread.shape[1]
            if start and (compile or device.type == 'cuda'):
                position = torch.full((), start, device=device)
                take = take or (record(step, unread, position) if device.type == 'cuda' else step)
                logits = take(unread, position)
            else:
                rows = batch if start or (unread != unread[:1]).any() else 1  # rows that are all alike are read once
                x = self.hidden(unread[:rows], [layer[:, :rows, :, :end] for layer in cache], start)[:, -1]
                if rows < batch:
                    for layer in cache:
                        layer[:, 1:, :, :end] = layer[:, :1, :, :end]
                logits = self.lm_head(x).expand(batch, -1)
            token = sample_token(logits[:, :vocab_size], temperature, top_k, top_p)
            yield token
            start, unread = end, token[:, None]
            window = torch.cat((window, unread), dim=1)[:, -size:]

    @classmethod
    def from_checkpoint(cls, checkpoint, **changes):
        """The model in a checkpoint that load_checkpoint read, with the changes made to its config (dropout, say)."""
        args, weights = checkpoint['model_args'] | changes, checkpoint['model']
        try:
            if args['n_layer'] > len(weights):
                raise ValueError(f"{args['n_layer']} layers in {len(weights)} tensors")
            with torch.device('meta'):  # shapes alone: the weights take their places, with no second copy of any
                model = cls(GPTConfig(**args))
            model.load_state_dict({name: w.float() for name, w in weights.items()}, assign=True)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"a checkpoint's weights do not fit its model_args: {error}") from None
        model.lm_head.weight = model.transformer.wte.weight
        return model

    @classmethod
    def from_pretrained(cls, source, **changes):
        """GPT-2 itself ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl': downloaded once), or a model of its kind from a
        folder or .safetensors file in Hugging Face's format."""
        return cls.from_checkpoint(load_pretrained(source), **changes)

    def quantize(self):
        """Keep the matrices in 8 bits, to generate. Embeddings stay as they are."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.quantize()

    def crop_block_size(self, block_size):
        """Shorten the window, e.g. to finetune on shorter texts: the later positions are dropped."""
        assert block_size <= self.config.block_size
        self.config.block_size = block_size
        if not self.config.rope:
            wpe = self.transformer.wpe
            wpe.weight, wpe.num_embeddings = nn.Parameter(wpe.weight[:block_size].clone()), block_size

    def num_params(self):
        return sum(p.numel() for p in self.parameters())  # the tied head counts once

    def flops_per_token(self):
        """Floating point operations to train on one token, by the usual account: forward 2 per weight of every matrix
        and 4 * T * C per layer for attention (as if not causal), backward twice that."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and 'wpe' not in name)
        return 6 * matrices + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def configure_optimizers(self, kind, weight_decay, learning_rate, betas):
        """{'adamw': AdamW for all}, or with kind='muon' {'adamw': ..., 'muon': Muon for the blocks' matrices}. Matrices
        decay towards zero, vectors (biases, norms) do not. Muon's step changes a matrix by as much in every direction,
        and is scaled to the usual size of AdamW's, so that one learning rate serves both."""
        inner = [p for p in self.transformer.h.parameters() if p.dim() == 2] if kind == 'muon' else []
        inside = set(inner)
        matrices = [p for p in self.parameters() if p.dim() == 2 and p not in inside]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        optimizers = dict(adamw=torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True))
        if inner:
            optimizers['muon'] = torch.optim.Muon(inner, lr=learning_rate, weight_decay=weight_decay,
                                                  momentum=betas[0], adjust_lr_fn='match_rms_adamw')
        return optimizers


class Linear(nn.Linear):
    """y = W x + b. To generate token by token is to read all of W from memory again and again, and on a CPU the usual
    product keeps far below what memory can deliver: hence two other ways to put it for a few tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer('scale', None)  # of each row, if W is int8

    def quantize(self):
        """Keep W in 8 bits: each row in steps of 1/127 of its largest weight, rounded so that bfloat16 holds them."""
        assert self.scale is None, 'quantized already'
        w = self.weight.detach()
        self.scale = (w.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16().float()
        steps = (w / self.scale[:, None]).round().clamp(-127, 127)
        self.weight = nn.Parameter(steps.to(torch.int8), requires_grad=False)

    def forward(self, x):
        w, rows = self.weight, x.numel() // self.in_features
        few = not torch.is_grad_enabled() and x.device.type == 'cpu' and rows <= 4
        if few and torch.compiler.is_compiling():  # one loop over W, which serves all rows
            flat = x.reshape(rows, -1).contiguous()
            flat = flat.as_strided(flat.shape, flat.stride())  # has x computed before the loop instead of inside
            y = (w[:, None] * flat).sum(-1).t()
        elif few and w.dtype == torch.float32:  # W in parts, so that every core has some
            cores = torch.get_num_threads()
            parts = next((n for n in range(cores, 16 * cores) if self.out_features % n == 0), 1)
            y = x.reshape(1, rows, -1).expand(parts, -1, -1) @ w.view(parts, -1, self.in_features).transpose(1, 2)
            y = y.transpose(0, 1)
        elif self.scale is None:
            return super().forward(x)
        else:
            return F.linear(x, w * self.scale[:, None].type_as(x), self.bias)
        y = y.reshape(*x.shape[:-1], -1)
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias


def record(step, *inputs):
    """Record all that step launches on the GPU, as a CUDA graph: to replay it takes one launch instead of hundreds."""
    inputs = [x.clone() for x in inputs]  # our own: each replay overwrites them
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # what happens only at first must not be recorded: compiling, choosing kernels
            step(*inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(*inputs)

    def replay(*new):
        for old, now in zip(inputs, new, strict=True):
            old.copy_(now)
        graph.replay()
        return output
    return replay


def sample_token(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw one token for each row of scores: logits (B, vocab) -> (B,)."""
    if temperature < 1e-6:  # dividing by so little would overflow
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature  # below 1 sharpens the choice, above 1 flattens it
    nucleus, ids = top_p is not None and top_p < 1, None
    if top_k or nucleus:  # the k likeliest, in this order
        logits, ids = logits.topk(min(top_k or math.inf, logits.shape[-1]))
    probs = logits.softmax(dim=-1)
    if nucleus:
        probs = probs * (probs.cumsum(dim=-1) - probs < top_p)  # none whose betters hold that much already
    probs = probs.cpu() if probs.device.type == 'mps' else probs  # whose multinomial can draw ids of no probability
    token = torch.multinomial(probs, 1).to(logits.device)
    return (token if ids is None else ids.gather(1, token)).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in. Wherever they come from, they become one kind of dict, of which GPT.from_checkpoint makes a model.

PRETRAINED = {  # layers, heads, width; and the sha256 of its file, where known
    'gpt2': (12, 12, 768, '248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707'),
    'gpt2-medium': (24, 16, 1024, 'fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd'),
    'gpt2-large': (36, 20, 1280, None), 'gpt2-xl': (48, 25, 1600, None)}
DTYPES = dict(F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, U8=torch.uint8, BOOL=torch.bool)
FACTS = dict(model_type='gpt2', activation_function='gelu_new', layer_norm_epsilon=1e-5, n_inner=None,
             scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True,
             add_cross_attention=False)  # what every config.json of a GPT-2 says, if only by default
TURNED = ('c_attn.weight', 'c_fc.weight', 'c_proj.weight')  # Hugging Face keeps these matrices the other way round


def load_checkpoint(source, *more, data=None):
    """A model and what belongs to it, on the CPU: weights (model), model_args, tokenizer, config, iter_num,
    best_val_loss, path, and more that is asked for by name. The source is a file that train.py or nanoGPT saved, the
    folder of a run (its best.pt, or else ckpt.pt), or what GPT.from_pretrained takes. Loading it cannot run code.
    data is the folder of a dataset, to be asked first for the characters of a nanoGPT model."""
    if source in PRETRAINED or source.endswith('.safetensors') or os.path.exists(os.path.join(source, 'config.json')):
        return load_pretrained(source)
    best, newest = os.path.join(source, 'best.pt'), os.path.join(source, 'ckpt.pt')
    path = best if os.path.exists(best) else newest if os.path.isdir(source) else source
    if not os.path.exists(path):
        raise UserError(f'{path!r}: there is no such checkpoint: --init_from takes the folder of a run or one of '
                        f'{", ".join(PRETRAINED)}, or train a model: python train.py config/train_shakespeare.py')
    with open(path, 'rb') as f:
        try:
            if zipfile.is_zipfile(f):
                archive = zipfile.ZipFile(f)
                folders = [part.filename for part in archive.infolist() if part.external_attr]  # torch would read zeros
                if damaged := archive.testzip() or folders:
                    raise ValueError(f'{damaged} is not what was saved')
            f.seek(0)
            checkpoint = dict(torch.load(f, map_location='cpu', weights_only=True))
            if 'tokenizer' not in checkpoint:
                checkpoint.update(from_nanogpt(checkpoint, path, data))
        except UserError:
            raise
        except Exception as error:  # torch.load has many ways to say that a file is damaged
            folder, reason = Path(path).parent, f'{type(error).__name__}: {str(error)[:80]}'
            others = sorted({*folder.glob('*.pt'), *folder.glob('earlier-*/*.pt')} - {Path(path)})
            raise UserError(f'{path} is damaged or not a checkpoint ({reason}): to start from, there is '
                            f'{", ".join(map(str, others)) or "no other beside it"}') from error
    kinds = dict.fromkeys(('model', 'model_args', 'tokenizer', 'config', *more), dict)
    kinds |= dict(iter_num=int, best_val_loss=float)
    if wrong := [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]:
        raise UserError(f"{path} is not a checkpoint to start from this way: it lacks {', '.join(wrong)}")
    return checkpoint | dict(path=path)


def from_nanogpt(checkpoint, path, data):
    """What is different in a nanoGPT checkpoint: the compiler's prefix in names, masks among the weights, the loss in a
    tensor, and no tokenizer: it is GPT-2's, or its dataset's, which lies where nanoGPT keeps it or in our data."""
    n_vocab, dataset = checkpoint['model_args']['vocab_size'], os.path.basename(checkpoint['config']['dataset'])
    tokenizer = dict(type='gpt2')
    if n_vocab not in (50257, 50304):
        beside, ours = os.path.join(os.path.dirname(path), '..', 'data', dataset), os.path.join(DATA, dataset)
        found = [nanogpt_tokenizer(folder) for folder in (data, beside, ours) if folder]
        tokenizer = next((spec for spec in found if spec and len(spec['chars']) == n_vocab), None)
        if not tokenizer:
            raise UserError(f'{path}: nanoGPT trained this with the {n_vocab} characters of its dataset {dataset!r}, '
                            f'but there is no meta.pkl with as many: copy its folder to {ours}')
    weights = {name.removeprefix('_orig_mod.'): w for name, w in checkpoint['model'].items()
               if not name.endswith('.attn.bias')}
    return dict(model=weights, best_val_loss=float(checkpoint['best_val_loss']), scaler={}, tokenizer=tokenizer,
                optimizer=checkpoint.get('optimizer') and dict(adamw=checkpoint['optimizer']))


def load_pretrained(source):
    """Weights in Hugging Face's format as a checkpoint: in float32, with our names and our way round."""
    path = Path(find_pretrained(source) if source in PRETRAINED else source)
    files = sorted(path.glob('model*.safetensors')) or [path]  # a large model has several
    if not files[0].is_file():
        raise UserError(f'{source}: there is no model.safetensors: name a folder that transformers or '
                        'python model.py --export_dir=FOLDER has written')
    folder, weights = files[0].parent, {}
    for file in files:
        for name, tensor in read_safetensors(file):
            name = name.removeprefix('transformer.')
            if name.endswith(('.attn.bias', '.attn.masked_bias')):  # masks, in old files
                continue
            if not tensor.is_floating_point():
                raise UserError(f'{file}: {name} is of {tensor.dtype}, and weights are F32, F16 or BF16')
            tensor = tensor.transpose(0, -1) if name.endswith(TURNED) else tensor
            tensor = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            weights[name if name == 'lm_head.weight' else f'transformer.{name}'] = tensor
    try:
        wte, wpe = weights['transformer.wte.weight'], weights['transformer.wpe.weight']
        (vocab_size, n_embd), block_size = wte.shape, len(wpe)
    except (KeyError, ValueError, TypeError):
        raise UserError(f'{source} is not a GPT-2: its tensors are {", ".join(weights)[:100]}...') from None
    if not torch.equal(weights.setdefault('lm_head.weight', wte), wte):
        raise UserError(f'{source}: lm_head.weight is not wte.weight, which GPT-2 uses for both')

    config = read_json(folder / 'config.json')
    n_layer = sum(name.endswith('.ln_1.weight') for name in weights)
    facts = FACTS | dict(n_layer=n_layer, n_embd=n_embd, n_positions=block_size, vocab_size=vocab_size)
    synonyms = dict(activation_function='gelu_pytorch_tanh', n_inner=4 * n_embd)
    for key, value in facts.items():
        if config.get(key, value) not in (value, synonyms.get(key, value)):
            raise UserError(f'{folder}/config.json says {key}={config[key]!r}, but this GPT-2 has {value!r}')
    if 'n_head' not in config and n_embd % 64:
        raise UserError(f'{source}: a width of {n_embd} is not heads of 64 as in GPT-2: their number belongs in a '
                        'config.json beside it, as n_head')

    tokenizer = read_json(folder / 'meta.json').get('tokenizer')  # what we exported
    if not tokenizer:
        vocabularies = [p.read_bytes() for p in (folder / 'vocab.json', folder / 'tokenizer.json') if p.exists()]
        is_gpt2 = 50257 <= vocab_size <= 50304 and all(re.search(rb'gazed": ?50255\b', v) for v in vocabularies)
        tokenizer = dict(type='gpt2' if is_gpt2 else 'unknown')
    model_args = dict(n_layer=n_layer, n_head=config.get('n_head', n_embd // 64), n_embd=n_embd, block_size=block_size,
                      vocab_size=vocab_size, bias='transformer.ln_f.bias' in weights, dropout=0.0)
    return dict(model=weights, model_args=model_args, tokenizer=tokenizer, config={}, iter_num=0,
                best_val_loss=math.inf, path=str(files[0]))


def find_pretrained(name):
    """The file with these weights of OpenAI's: in our cache, in Hugging Face's, or downloaded to ours."""
    env = os.environ.get
    path = os.path.join(os.path.expanduser(env('GPT_CACHE') or '~/.cache/gpt'), name, 'model.safetensors')
    home = env('HF_HOME') or os.path.join(env('XDG_CACHE_HOME') or '~/.cache', 'huggingface')
    hub = os.path.expanduser(env('HF_HUB_CACHE') or os.path.join(home, 'hub'))
    for file in (path, *Path(hub).glob(f'models--openai-community--{name}/snapshots/*/model.safetensors')):
        if os.path.exists(file):
            return file
    print(f'{name}: downloading to {path} (another folder: GPT_CACHE=FOLDER)', file=sys.stderr)
    download({path: f'{HUB}/openai-community/{name}/resolve/main/model.safetensors'}, PRETRAINED[name][3],
             check=lambda path: next(read_safetensors(path), None))
    return path


def read_safetensors(path):
    """Yield (name, tensor) for a .safetensors file: the length of its header, the header, in JSON, which says what lies
    where, and the numbers. Nothing in it is believed: it has to add up. The tensors are pages of the file."""
    size, at = os.path.getsize(path), 0
    with open(path, 'rb') as f:
        length = int.from_bytes(f.read(8), 'little')
        try:
            header = json.loads(f.read(min(length, 100_000_000)))  # what is longer is no header
            header.pop('__metadata__', None)
            entries = sorted((*entry['data_offsets'], name, entry['dtype'], entry['shape'])
                             for name, entry in header.items())
            for begin, end, name, dtype, shape in entries:
                whole = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
                if not whole or begin != at or end - at != math.prod(shape) * DTYPES[dtype].itemsize:
                    raise ValueError(f'{name}, {dtype} {shape}, in bytes {begin} to {end}, where {at} are taken')
                at = end
            if 8 + length + at != size:
                raise ValueError(f'{8 + length + at:,} bytes by its header, {size:,} on disk')
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f'{path} is damaged or not a safetensors file: {str(error)[:200]}') from None
    for begin, end, name, dtype, shape in entries:
        if end > begin:  # each is mapped by itself: pages once read would count as memory
            data = np.memmap(path, np.uint8, 'c', 8 + length + begin, end - begin)
            yield name, torch.from_numpy(data).view(DTYPES[dtype]).view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Weights out.

def to_huggingface(checkpoint, folder):
    """Write a folder that transformers loads: the weights, what it wants to know of them, and the tokenizer."""
    model = GPT.from_checkpoint(checkpoint)
    config, tensors = model.config, {}
    if flags := [flag for flag in ('rope', 'qk_norm', 'relu2') if getattr(config, flag)]:
        raise UserError(f"GPT-2's format has no place for {', '.join(flags)}: only models without can be exported this "
                        'way; --export_onnx=FILE can hold it')
    tok = get_tokenizer(checkpoint['tokenizer'])
    for name, w in model.named_parameters():  # the tied head is not named again
        w = w.detach()[:tok.n_vocab if 'wte' in name else None]  # without the padding
        tensors[name] = w.T if name.endswith(TURNED) else w
        if not config.bias and not name.endswith(('wte.weight', 'wpe.weight')):
            tensors[name.replace('weight', 'bias')] = torch.zeros(len(w))
    header, at = dict(__metadata__=dict(format='pt')), 0
    for name, tensor in tensors.items():
        header[name] = dict(dtype='F32', shape=list(tensor.shape), data_offsets=[at, at := at + tensor.nbytes])
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)

    facts = FACTS | dict(
        architectures=['GPT2LMHeadModel'], n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
        n_positions=config.block_size, vocab_size=len(tensors['transformer.wte.weight']), dtype='float32',
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout)
    ends = dict(bos_token_id=tok.eot, eos_token_id=tok.eot)
    files = {'config.json': facts | ends, 'generation_config.json': ends if tok.eot is not None else {},
             'meta.json': dict(tokenizer=checkpoint['tokenizer'], vocab_size=tok.n_vocab)}
    if isinstance(tok, BPETokenizer):
        files.update(tok.huggingface())
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'model.safetensors')
    with open(path + '.tmp', 'wb') as f:
        f.write(len(header).to_bytes(8, 'little') + header)
        for tensor in tensors.values():
            tensor.contiguous().numpy().tofile(f)
    os.replace(path + '.tmp', path)
    for name, content in files.items():
        Path(folder, name).write_text(json.dumps(content, indent=1), encoding='utf-8')
    print(f'{folder}: model.safetensors, {", ".join(files)}')


def to_onnx(model, path):
    """Write the model as an ONNX graph from idx, of any batch size and length, to logits."""
    optional('onnxscript', 'export_onnx')  # which brings onnx along
    torch.onnx.export(model, (torch.zeros(2, 2, dtype=torch.long),), path, input_names=['idx'], output_names=['logits'],
                      dynamic_shapes=dict(idx={0: 'batch', 1: 'time'}), dynamo=True, verbose=False)
    print(f'{path}: idx (batch, time up to {model.config.block_size}) -> logits (batch, time, vocabulary)')


# ---------------------------------------------------------------------------------------------------------------------
# What running this file prints.

CARDS = 8, 12, 16, 24, 40, 48, 80, 141, 192  # GB that GPUs have
WHAT = dict(wte='token id -> vector', wpe='position -> vector, added', drop='dropout', ln_1='normalise each token',
            attn='gather from earlier tokens', c_attn='queries, keys, values', c_proj='back to the stream, added',
            ln_2='normalise each token', c_fc='widen', ln_f='normalise each token', lm_head='score every token')


def watch(model, *inputs):
    """One forward pass: what comes out of every module, by name, in the order in which they are done."""
    names, outputs = {module: name for name, module in model.named_modules()}, {}
    with nn.modules.module.register_module_forward_hook(lambda module, _, out: outputs.update({names[module]: out})):
        model(*inputs)
    return outputs


@torch.no_grad()
def follow(model, tok, text, layer, head):
    """One forward pass, step by step: what comes out of every module, whom a head of a layer attends to, and what the
    model would say next after each block. Returns the logits."""
    check(dict(layer=layer, head=head), 'layer >= 0', f'layer < {model.config.n_layer}', 'head >= 0',
          f'head < {model.config.n_head}')
    ids = tok.encode(text, special=True).tolist()
    if not 0 < len(ids) <= model.config.block_size:
        raise UserError(f'trace={text!r} is {len(ids)} tokens: from 1 to block_size={model.config.block_size} of them')
    piece = lambda i: repr(tok.decode_bytes([i]).decode('utf-8', 'replace'))[1:-1]  # noqa: E731
    from unittest.mock import patch
    with patch.object(F, 'scaled_dot_product_attention', wraps=F.scaled_dot_product_attention) as attend:
        outputs = watch(model, torch.tensor([ids]))
    q, k = (x[0, head] for x in attend.call_args_list[layer].args[:2])  # (T, head size)
    # where each value is a 1 in a place of its own, what comes out are the shares: (T, T)
    shares = F.scaled_dot_product_attention(q, k, torch.eye(len(ids)), is_causal=True)

    print(f'{len(ids)} tokens: ' + ' '.join(f'{piece(i)!r}={i}' for i in ids))
    print(f'\n{"what comes out of":<30}{"shape":<20}{"mean":>8}{"std":>8}  what it did')
    for name, out in outputs.items():
        last = name.split('.')[-1]
        what = 'the stream after this block' if last.isdigit() else WHAT.get(last)
        if what and (name.count('.') < 3 or name.startswith(f'transformer.h.{layer}.')):
            print(f'{name:<30}{str(tuple(out.shape)):<20}{out.mean():>8.3f}{out.std():>8.3f}  {what}')

    print(f'\nlayer {layer}, head {head}: how much each token (a row) takes from those up to itself (columns)\n'
          'from . for 10% and more, over : - = + * # and %, to @ for 90%')
    labels = [piece(i)[:12] for i in ids]
    for letters in zip(*(label.rjust(max(map(len, labels))) for label in labels), strict=True):
        print(' ' * 14 + ' '.join(letters))
    for label, row in zip(labels, shares.tolist(), strict=True):
        print(f'{label:>12}  ' + ' '.join(' .:-=+*#%@'[min(9, int(share * 10))] for share in row).rstrip())

    print('\nafter block    length of the stream    what it would say next, were this the last')
    for i in range(model.config.n_layer):
        x = outputs[f'transformer.h.{i}']
        scores = model.lm_head(model.transformer.ln_f(x[:, -1]))[0, :tok.n_vocab]
        chances, likely = scores.softmax(-1).topk(min(5, tok.n_vocab))
        guesses = '  '.join(f'{piece(i)!r} {p:.1%}' for i, p in zip(likely.tolist(), chances.tolist(), strict=True))
        print(f'{i:>11}{x.norm(dim=-1).mean():>24.2f}    {guesses}')
    return outputs['lm_head']


def explain(config, batch_size, dtype):
    """Print every module of a model with what it does, its output's shape, parameters and forward FLOPs; then totals
    and the memory that training takes. Fake tensors have shapes but no numbers, so that any size is instant."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    tokens = batch_size * config.block_size

    def forward(recompute):
        """What comes out of every module, and how many bytes autograd keeps for the backward pass, weights aside."""
        model.recompute = recompute
        kept = {p.untyped_storage()._cdata: p for p in model.parameters()}  # each storage counts once
        keep = lambda t: kept.setdefault(t.untyped_storage()._cdata, t)  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            outputs = watch(model, idx, idx)
        return outputs, sum(t.untyped_storage().nbytes() for t in kept.values()) - 4 * n

    with FakeTensorMode(), torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
        model, idx = GPT(config), torch.zeros(batch_size, config.block_size, dtype=torch.long)
        n = model.num_params()
        (outputs, kept), (_, outside) = forward(False), forward(True)

    print(f'{"module":<30}{"what it does":<30}{"output":<22}{"parameters":>14}{"forward GFLOPs":>16}')
    for name, module in model.named_modules():
        last = name.split('.')[-1]
        if name == 'transformer.h.1':
            print(f'transformer.h.1 ... {config.n_layer - 1}: the same again')
        if last in WHAT and not re.match(r'transformer\.h\.[1-9]', name):
            parameters = f'{sum(p.numel() for p in module.parameters(recurse=False)):,}'
            flops = 2 * tokens * module.weight.numel() if isinstance(module, Linear) else 0
            if last == 'attn':  # q k^T and its product with v
                flops = 4 * tokens * config.block_size * config.n_embd
            print(f'{name:<30}{WHAT[last]:<30}{str(tuple(outputs[name].shape)):<22}'
                  f'{"tied to wte" if last == "lm_head" else parameters:>14}{flops / 1e9:>16,.3f}')
    print(f'\nparameters {n:,}; to train on one token takes {model.flops_per_token() / 1e9:,.3f} GFLOPs, '
          f'on a batch of {batch_size} x {config.block_size} {model.flops_per_token() * tokens / 1e12:,.3f} TFLOPs\n'
          f'weights alone in MB: {4 * n / 1e6:,.1f} in float32, {2 * n / 1e6:,.1f} in bfloat16, {n / 1e6:,.1f} in int8')

    inside = (kept - outside) / config.n_layer  # with activation_checkpointing: of one block, and what enters each
    fewer = outside + inside + 4 * tokens * config.n_embd * config.n_layer
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    gathered = 4 * (n - config.n_layer * block) + 2 * (4 if dtype == 'float32' else 2) * block
    print(f'\n{f"memory to train on that batch in {dtype}, at least, in MB":<60}{"weights":>12}{"gradients":>12}'
          f'{"AdamW":>12}{"activations":>12}{"together":>12}  fits into')
    for gpus, kind in ((1, 'one GPU, or each with ddp'), (8, 'each of 8 with fsdp'), (64, 'each of 64 with fsdp')):
        for what, size in (('', kept), (', activation_checkpointing', fewer)):
            memory = [4 * n / gpus + gathered * (gpus > 1), 4 * n / gpus, 8 * n / gpus, size]
            card = next((f'{gb} GB' for gb in CARDS if sum(memory) < 0.9e9 * gb), 'no card')
            print(f'{kind + what:<60}' + ''.join(f'{m / 1e6:>12,.1f}' for m in (*memory, sum(memory))) + f'  {card}')


if __name__ == '__main__':
    init_from = ''      # the model to explain or export: the folder of a run, a checkpoint, gpt2-xl, ...; '': random
    trace = ''          # a text: show how it goes through the model, step by step
    layer = 0           # of the trace: whose attention to show
    head = 0            # and of which of its heads
    export_dir = ''     # write it there for Hugging Face's transformers
    export_onnx = ''    # write it to this file for ONNX runtimes
    batch_size = 8      # to explain: how many windows are trained on at once
    dtype = 'bfloat16'  # to explain: of the activations, bfloat16 or float32; all else is float32
    globals().update(vars(GPTConfig()))
    settings = configure(globals())
    check(settings, 'batch_size > 0', "dtype in ('float32', 'bfloat16')")
    config = GPTConfig(**{name: settings[name] for name in vars(GPTConfig())})
    if export_dir or export_onnx:
        if not init_from:
            raise UserError('to export a model it has to be named: --init_from=out-mine, say')
        checkpoint = load_checkpoint(init_from)
        if export_dir:
            to_huggingface(checkpoint, export_dir)
        if export_onnx:
            to_onnx(GPT.from_checkpoint(checkpoint, dropout=0.0).eval(), export_onnx)
    elif trace:
        if init_from:
            checkpoint = load_checkpoint(init_from)
        else:  # a random model of these characters
            chars = ''.join(sorted(set(trace)))
            config.vocab_size = len(chars)
            checkpoint = dict(model=GPT(config).state_dict(), model_args=vars(config),
                              tokenizer=dict(type='char', chars=chars))
        follow(GPT.from_checkpoint(checkpoint).eval(), get_tokenizer(checkpoint['tokenizer']), trace, layer, head)
    else:
        if init_from in PRETRAINED:  # known without the weights
            n_layer, n_head, n_embd, _ = PRETRAINED[init_from]
            config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        elif init_from:
            config = GPTConfig(**load_checkpoint(init_from)['model_args'])
        explain(config, batch_size, dtype)
