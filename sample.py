"""
Generate text with a model.

$ python sample.py --out_dir=out-shakespeare           # the best model of a run
$ python sample.py --out_dir=out --start="To be" --temperature=0.5
$ python sample.py --init_from=gpt2-xl --start="The meaning of life is"
$ python sample.py --out_dir=out-qa --interactive=True # a conversation
$ cat prompt.txt | python sample.py --init_from=out/ckpt.pt --start=-

The text goes to stdout, everything else to stderr.
"""
import codecs
import contextlib
import signal
import sys
import time

import torch

from configurator import UserError, check, configure, printable, resolve_device, resolve_dtype
from model import GPT, keep_memory, load_checkpoint, optimize_for_generation
from prepare import get_tokenizer

init_from = 'resume'   # 'resume' (the best model in out_dir), a folder, a checkpoint, or gpt2-xl
out_dir = 'out'        # folder of a training run
start = ''             # prompt or system message, \n for a new line; FILE:prompt.txt reads a file, - stdin
num_samples = 3        # number of texts; the first is streamed
max_new_tokens = 500   # maximum length of each text
temperature = 0.8      # below 1: more predictable; 0: always the most likely token
top_k = 200            # sample from the k most likely tokens; 0: from all
top_p = 1.0            # sample from the fewest tokens with this total probability; 1: no limit
interactive = False    # a conversation, or one prompt after another, from the terminal or stdin
seed = 1337            # random seed: change it for different text
device = 'auto'        # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best available
dtype = 'auto'         # 'float32', 'bfloat16', 'float16'; auto: float32 on a CPU
quantize = ''          # 'int8': 8-bit arithmetic, faster on a CPU

check(configure(globals()), 'num_samples > 0', 'max_new_tokens >= 0', 'temperature >= 0', 'top_k >= 0',
      'top_p > 0', 'top_p <= 1', 'seed >= 0', 'seed < 2**63', "quantize in ('', 'int8')")
keep_memory()
sys.stdout.reconfigure(errors='replace')  # for terminals that lack a character
if hasattr(signal, 'SIGPIPE'):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # sample.py | head ends quietly


def read_prompt():
    """The prompt itself, or what a file or stdin contains."""
    if start == '-' or start.startswith('FILE:'):
        with open(0 if start == '-' else start[5:], encoding='utf-8', errors='replace') as f:
            return f.read()
    return start.replace('\\n', '\n')


def write_samples(ids, prompt, num_samples):
    """Print texts that continue the prompt, whose tokens are ids, up to the end of text. The first is
    streamed, the others follow. Returns the first."""
    if len(ids) > model.config.block_size:
        print(f'the prompt has {len(ids)} tokens; the model sees only the last '
              f'{model.config.block_size}', file=sys.stderr)
    texts = [prompt] * num_samples
    new_decoder = codecs.getincrementaldecoder('utf-8')  # tokens may end in the middle of a character
    decoders = [new_decoder('replace') for _ in texts]
    unfinished = set(range(num_samples))
    print(printable(prompt), end='', flush=True)

    begin = time.perf_counter()
    count = 0
    idx = torch.tensor([ids] * num_samples, device=device)
    try:
        for tokens in model.stream(idx, max_new_tokens, temperature, top_k, top_p, tok.n_vocab):
            for i, token in enumerate(tokens.tolist()):
                if token == tok.eot:
                    unfinished.discard(i)
                if i in unfinished:
                    text = decoders[i].decode(tok.decode_bytes([token]))
                    texts[i] += text
                    if i == 0:
                        print(printable(text), end='', flush=True)
            if not unfinished:
                break
            count += len(unfinished)
    except KeyboardInterrupt:  # Ctrl-C ends the text, not the session
        if not interactive:
            raise
    seconds = time.perf_counter() - begin

    print()
    for text in texts[1:]:
        print(f'---------------\n{printable(text)}')
    sys.stdout.flush()
    if not interactive:
        print(f'{count:,} tokens in {seconds:.1f} s: {count / max(seconds, 1e-9):,.0f} tok/s',
              file=sys.stderr)
    return texts[0]


def continue_text(prompt, num_samples):
    ids = tok.encode(prompt, special=True).tolist()
    write_samples(ids or [tok.eot or 0], prompt, num_samples)  # an empty prompt: the end of a text


def answer(question, turns, system):
    """Print the answer to a question, asked in the form of the training data, and add both to turns, which
    like system are ids. The oldest turns make room."""
    ids = tok.encode(form['user'] + question + '\n' + form['assistant']).tolist()
    block_size = model.config.block_size
    room = block_size - min(max_new_tokens, block_size // 2)
    while turns and len(system) + sum(map(len, turns)) + len(ids) > room:
        del turns[0]
    text = write_samples(system + sum(turns, []) + ids, '', num_samples=1)
    turns.append(ids + tok.encode(text).tolist() + [tok.eot])


def converse(system):
    """Read one line after another. A model trained on conversations answers; others continue the line."""
    if form:
        print('Ctrl-C ends an answer, /reset the conversation, Ctrl-D the session', file=sys.stderr)
    system = tok.encode(form['system'] + system.strip() + '\n').tolist() if system.strip() else []
    turns = []
    while True:
        try:
            line = input('> ' if sys.stdout.isatty() else '')
            if not form:
                continue_text(line, num_samples=1)
            elif line.strip() == '/reset':
                turns = []
                print('forgotten', file=sys.stderr)
            elif line.strip():
                answer(line.strip(), turns, system)
        except EOFError:  # Ctrl-D
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:  # Ctrl-C
            print()
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)


checkpoint = load_checkpoint(out_dir if init_from == 'resume' else init_from)
form = checkpoint.get('chat')  # how conversations are written, if it was trained on them
if interactive and (start == '-' or start and not form):
    raise UserError(f'start={start!r}, but with interactive=True prompts come from stdin: leave it out')
model = GPT.from_checkpoint(checkpoint, dropout=0.0)
tok = get_tokenizer(checkpoint['tokenizer'])
device = resolve_device(device)
dtype = resolve_dtype(dtype, device)
print(f"{checkpoint['path']}: {model.num_params():,} parameters, on {device} in {dtype}", file=sys.stderr)
model.to(device, getattr(torch, dtype)).eval()
optimize_for_generation(model, quantize == 'int8')
torch.manual_seed(seed)
prompt = read_prompt()
if interactive:
    sys.stdin.reconfigure(errors='replace')
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # on Windows the terminal itself does this
            import readline  # noqa: F401  line editing and history for input()
    converse(prompt)
else:
    if form:
        print('trained on conversations: add --interactive=True to get answers', file=sys.stderr)
    continue_text(prompt, num_samples)
