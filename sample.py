"""
Write text with a model.

$ python sample.py --out_dir=out-shakespeare                      # the best model of a run
$ python sample.py --out_dir=out --start="To be" --num_samples=1 --temperature=0.5
$ cat prompt.txt | python sample.py --init_from=out/ckpt.pt --start=- --stop=END
$ python sample.py --init_from=gpt2-xl --start="The meaning of life is"
$ python sample.py --out_dir=out-shakespeare --interactive=True   # a prompt at a time; Ctrl-C ends a text, Ctrl-D all

The text goes to stdout, everything else to stderr.
"""
import codecs
import signal
import sys
import time

import torch

from configurator import UserError, check, configure, keep_memory, resolve
from model import GPT, load_checkpoint
from prepare import get_tokenizer

init_from = 'resume'   # 'resume' (the run in out_dir, its best.pt or else ckpt.pt), out-mine, x/ckpt.pt, gpt2-xl, ...
out_dir = 'out'        # where a run has left its checkpoints
start = ''             # the beginning to go on from; FILE:prompt.txt reads a file, - standard input
num_samples = 3        # how many texts: the first appears as it is written, the others, written beside it, afterwards
max_new_tokens = 500   # length of each
temperature = 0.8      # 1: as the model believes, less: more predictable, 0: always the likeliest token
top_k = 200            # only the k likeliest tokens; 0: all
top_p = 1.0            # only the likeliest tokens that hold this much probability together; 1: all
stop = ''              # end a text where this appears in it
interactive = False    # ask for one beginning after another, and go on from each
seed = 1337            # another seed, another text
device = 'auto'        # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
dtype = 'auto'         # of weights and arithmetic: 'float32', 'bfloat16', 'float16'; auto: what the device is good at
quantize = ''          # 'int8': the matrices in 8 bits, which on a CPU are read faster still
compile = 'auto'       # torch.compile: True, False; auto: where so much is to be written that it pays, and for int8


class Writer:
    """Bytes of tokens in, whole characters of text out, up to where stop appears."""

    def __init__(self, stop):
        self.stop, self.held, self.ended = stop, '', False
        self.decode = codecs.getincrementaldecoder('utf-8')('replace').decode

    def __call__(self, data, final=False):
        """The text that can be shown now: what may be the beginning of stop is held back until more has come."""
        text = '' if self.ended else self.held + self.decode(data, final)
        if self.stop and self.stop in text:
            self.ended = True
            return text[:text.index(self.stop)]
        hold = 0 if final else max((n for n in range(len(self.stop)) if text.endswith(self.stop[:n])), default=0)
        self.held = text[len(text) - hold:]
        return text[:len(text) - hold]


def read_start(start):
    if start != '-' and not start.startswith('FILE:'):
        return start
    try:
        with open(0 if start == '-' else start[5:], encoding='utf-8') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'start={start} cannot be read as a text in UTF-8 ({error})') from None


def write(model, tok, prompt, num_samples, max_new_tokens, temperature, top_k, top_p, stop, compile):
    """Print texts that go on from the prompt, the first of them as it is written."""
    ids = tok.encode(prompt, special=True).tolist()
    ids = ids or [tok.eot or 0]  # it starts from the end of the text before, or the first character, the newline
    if len(ids) > model.config.block_size:
        print(f'the prompt has {len(ids)} tokens, the model sees the last {model.config.block_size}', file=sys.stderr)

    writers, others = [Writer(stop) for _ in range(num_samples)], [prompt] * (num_samples - 1)
    print(prompt, end='', flush=True)
    begin, count = time.time(), 0
    idx = torch.tensor([ids] * num_samples, device=model.lm_head.weight.device)
    for step in model.generate(idx, max_new_tokens, temperature, top_k, top_p, tok.n_vocab, compile):
        first, *rest = [writer(tok.decode_bytes([token])) for writer, token in zip(writers, step.tolist(), strict=True)]
        print(first, end='', flush=True)
        others = [text + more for text, more in zip(others, rest, strict=True)]
        count += num_samples
        if all(writer.ended for writer in writers):
            break
    seconds = time.time() - begin
    first, *rest = [writer(b'', final=True) for writer in writers]
    others = [f'---------------\n{text}{more}' for text, more in zip(others, rest, strict=True)]
    print(first, *others, sep='\n', flush=True)
    print(f'{count:,} tokens in {seconds:.1f} s: {count / max(seconds, 1e-9):,.0f} tok/s', file=sys.stderr)


if __name__ == '__main__':
    settings = configure(globals())
    check(settings, 'temperature >= 0', 'top_k >= 0', 'top_p > 0', 'top_p <= 1', 'num_samples > 0',
          'max_new_tokens >= 0', 'seed >= 0', 'seed < 2**63', "quantize in ('', 'int8')")
    keep_memory()
    sys.stdout.reconfigure(errors='replace')  # a terminal that lacks a character shows another
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # sample.py | head ends quietly

    if interactive and start:
        raise UserError('interactive=True asks for the beginnings: leave --start out')
    prompt = read_start(start)
    checkpoint = load_checkpoint(out_dir if init_from == 'resume' else init_from)
    device, dtype, compile = resolve(device, dtype, compile)
    model = GPT.from_checkpoint(checkpoint, dropout=0.0)
    tok = get_tokenizer(checkpoint['tokenizer'])
    trained = f"step {checkpoint['iter_num']}, val loss {checkpoint['best_val_loss']:.4f}, "
    print(f"{checkpoint['path']}: {trained if checkpoint['config'] else ''}{model.num_params():,} parameters, "
          f'on {device} in {dtype}', file=sys.stderr)
    if quantize:
        model.quantize()
    model.to(device, getattr(torch, dtype)).eval()
    if settings['compile'] == 'auto':  # it takes half a minute and saves up to half of what reading the weights takes
        to_read = max_new_tokens * sum(p.nbytes for p in model.parameters())
        compile = device != 'mps' and (quantize != '' or to_read > 2e12)
        if compile:
            torch._dynamo.config.suppress_errors = True  # where it cannot be compiled, go on without

    torch.manual_seed(seed)
    if not interactive:
        write(model, tok, prompt, num_samples, max_new_tokens, temperature, top_k, top_p, stop, compile)
    while interactive:
        try:
            print('> ', end='', file=sys.stderr, flush=True)
            prompt = input()
            write(model, tok, prompt, 1, max_new_tokens, temperature, top_k, top_p, stop, compile)
        except EOFError:  # Ctrl-D
            print()
            break
        except KeyboardInterrupt:  # ends the text, not the conversation
            print()
        except (UserError, UnicodeDecodeError) as error:  # a character that tokenizer or terminal do not know
            print(f'error: {error}', file=sys.stderr)
