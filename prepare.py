"""
Turn text into tokens: data/NAME/train.bin and val.bin (raw uint8 or uint16 ids)
and meta.json (the tokenizer and the counts). For conversations it also writes
train.mask and val.mask: 1 for a token that the loss counts, 0 for others.

$ python prepare.py --dataset=shakespeare_char  # the embedded text, by chars
$ python prepare.py --dataset=shakespeare       # the same in GPT-2's tokens
$ python prepare.py --dataset=mine --source=my_texts/ --tokenizer=bpe
$ python prepare.py --dataset=qa --source=qa.jsonl # questions and answers
$ python prepare.py --dataset=fineweb --shards=10 # a billion tokens of FineWeb

A source is a text file, a .jsonl file (both may be gzipped), a .parquet file
with a "text" column, a folder of such files, or an https address. Each line of
a .jsonl file is an object with "text" or, for conversations, with "prompt" and
"completion" or with "messages", each with "role" (system, user or assistant)
and "content".

Tokenizers: char, gpt2, bpe (byte-pair encoding trained on the source), or that
of a run, a checkpoint or another dataset, to finetune a model on this text.
"""
import contextlib
import functools
import gzip
import hashlib
import heapq
import io
import json
import os
import pickle
import re
import shlex
import shutil
import sys
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import requests

from configurator import UserError, check, configure, optional, writing

dataset = 'shakespeare_char'  # a dataset of the table in this file, or a new name with --source
source = ''         # file, folder or https address of the text; '': the dataset's own
tokenizer = ''      # char, gpt2, bpe, a run, checkpoint or dataset; '': the dataset's own, or gpt2
vocab_size = 4096   # vocabulary size of a bpe tokenizer
val_fraction = 0.0  # fraction of tokens held out, from the end; 0: the dataset's own, or 0.1
shards = 0          # number of shards to download of a large dataset; 0: all

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')
SHAKESPEARE = os.path.join(DATA, 'shakespeare', 'input.txt')
HUB = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
OWT = HUB + '/datasets/Skylion007/openwebtext/resolve/main/plain_text/train-%05d-of-00080.parquet'
FINEWEB = HUB + '/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_'
PAUSES = 1, 2, 4, 0  # seconds to wait after each failed attempt to download
DATASETS = {  # shards: numbers that replace the % in source
    'shakespeare_char': dict(source=SHAKESPEARE, tokenizer='char'),
    'shakespeare': dict(source=SHAKESPEARE),
    'openwebtext': dict(source=OWT, shards=range(80), val_fraction=0.0005),
    'fineweb': dict(source=FINEWEB + 'train_%06d.bin', shards=range(1, 104), val=FINEWEB + 'val_000000.bin'),
}

# -----------------------------------------------------------------------------
# Tokenizers have n_vocab, eot (the id that ends documents, or None), encode(text) and decode_bytes(ids).

END_OF_TEXT = '<|endoftext|>'
END_CHARACTER = '\x03'  # the same for char tokenizers: ASCII's control character "end of text"
GPT2_VOCAB = 50257
SPLIT = (  # bpe merges bytes only within these pieces of text, which resemble GPT-4's
    r"'(?i:[sdmt]|ll|ve|re)"                      # English contractions
    r'|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,32}'  # a word with the space before it; \p{M}: vowel signs
    r'|\p{N}{1,3}'                                # up to three digits
    r'| ?[^\s\p{L}\p{M}\p{N}]{1,32}[\r\n]*'       # punctuation
    r'|\s{0,32}[\r\n]|\s{1,32}(?!\S)|\s{1,32}'     # white space
)  # without the limit of 32, training on text without spaces (DNA, Chinese) would take hours


def code_points(text):
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)


class CharTokenizer:
    """One id per character."""

    def __init__(self, chars):
        self.chars = chars
        self.n_vocab = len(chars)
        self.eot = chars.index(END_CHARACTER) if END_CHARACTER in chars else None
        # the id of every code point; n_vocab stands for an unknown character
        self.ids = np.full(sys.maxunicode + 1, self.n_vocab, np.min_scalar_type(self.n_vocab))
        self.ids[code_points(chars)] = np.arange(self.n_vocab)

    def encode(self, text, special=False):
        ids = self.ids.take(code_points(text))
        if len(ids) and ids.max() == self.n_vocab:
            unknown = ' '.join(map(repr, sorted(set(text) - set(self.chars))[:20]))
            raise UserError(f'unknown to the tokenizer: {unknown}: remove them from the text')
        return ids

    def decode_bytes(self, ids):
        return ''.join(self.chars[i] for i in ids).encode('utf-8', 'replace')


class BPETokenizer:
    """Byte-level byte-pair encoding by tiktoken. It can encode any text."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.n_vocab = encoding.n_vocab
        self.eot = encoding.eot_token

    def encode(self, text, special=False):
        """If special, <|endoftext|> becomes one token; otherwise it is ordinary text."""
        text = text.encode('utf-8', 'replace').decode('utf-8')  # UTF-8 has no lone surrogates
        allowed = {END_OF_TEXT} if special else set()
        return self.encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes([int(i) for i in ids])

    def huggingface_files(self):
        """The files from which transformers loads the same tokenizer: {name: content}."""
        # Hugging Face writes each byte as a printable letter
        printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
        substitutes = iter(range(256, 512))
        letters = [byte if byte in printable else next(substitutes) for byte in range(256)]
        pieces = [self.encoding.decode_single_token_bytes(i) for i in range(self.n_vocab) if i != self.eot]
        names = {piece: piece.decode('latin-1').translate(letters) for piece in pieces}
        halves = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))]
        merges = [(names[a], names[b]) for a, b in halves if a in names and b in names]
        vocab = {name: i for i, name in enumerate([*names.values(), END_OF_TEXT])}
        end = dict(id=self.eot, content=END_OF_TEXT, special=True, normalized=False, single_word=False,
                   lstrip=False, rstrip=False)
        pattern = dict(Regex=self.encoding._pat_str)
        split = dict(type='Split', pattern=pattern, behavior='Isolated', invert=False)
        byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
        return {
            'tokenizer.json': dict(
                version='1.0', added_tokens=[end], model=dict(type='BPE', vocab=vocab, merges=merges),
                pre_tokenizer=dict(type='Sequence', pretokenizers=[split, byte_level]), decoder=byte_level),
            'tokenizer_config.json': dict(
                tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
                bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)}


def get_tokenizer(spec):
    """The tokenizer that a spec describes. meta.json and every checkpoint contain a spec."""
    import tiktoken
    if spec['type'] == 'char':
        return CharTokenizer(spec['chars'])
    if spec['type'] == 'gpt2':
        try:
            return BPETokenizer(tiktoken.get_encoding('gpt2'))
        except requests.RequestException:
            raise UserError("cannot download GPT-2's tokenizer: the README says how to copy it") from None
    if spec['type'] == 'bpe':
        pieces = [bytes([byte]) for byte in range(256)]
        for left, right in spec['merges']:
            pieces.append(pieces[left] + pieces[right])
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        return BPETokenizer(tiktoken.Encoding('bpe', pat_str=spec['split'], mergeable_ranks=ranks,
                                              special_tokens={END_OF_TEXT: len(pieces)}))
    raise UserError("these weights were trained with an unknown tokenizer, not GPT-2's")


def train_bpe(words, n_merges):
    """Learn up to n_merges pairs of ids to merge from {word: count}: each time the most frequent pair
    becomes a new id. (test_bpe_training_is_the_textbook_algorithm has the definition in ten lines.)
    Counting all pairs again is slow, so this updates only the counts that a merge changes. It stops
    when no pair occurs twice, and skips a pair that spells an existing token."""
    # one character per id, so that str.replace merges a pair
    sequences = [word.encode('utf-8', 'replace').decode('latin-1') for word in words]
    frequencies = list(words.values())
    counts = Counter()
    places = defaultdict(set)  # the sequences that may contain a pair
    for i, ids in enumerate(sequences):
        for pair in pairwise(ids):
            counts[pair] += frequencies[i]
            places[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    pieces = [bytes([byte]) for byte in range(256)]
    known = set(pieces)
    merges = []
    while heap and heap[0][0] < -1 and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:  # other merges have reduced the count since
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        left, right = map(ord, pair)
        piece = pieces[left] + pieces[right]
        if piece in known:
            continue
        new_id = chr(len(pieces))
        pieces.append(piece)
        known.add(piece)
        merges.append((left, right))
        new_pairs = set()
        for i in places.pop(pair):
            for old_pair in pairwise(sequences[i]):
                counts[old_pair] -= frequencies[i]
            sequences[i] = sequences[i].replace(''.join(pair), new_id)
            for new_pair in pairwise(sequences[i]):
                counts[new_pair] += frequencies[i]
                if new_id in new_pair:
                    places[new_pair].add(i)
                    new_pairs.add(new_pair)
        for new_pair in new_pairs:
            heapq.heappush(heap, (-counts[new_pair], new_pair))
    return merges


# -----------------------------------------------------------------------------
# Reading sources. A source is a stream of (text, counts, ends): whether the loss counts the tokens,
# and whether the document ends there.

# How a conversation is written: each message follows the prefix of its role. A newline ends a question, the
# end of text an answer. Checkpoints contain this, so that sample.py asks in the same form.
CHAT_FORM = dict(system='', user='User: ', assistant='Assistant:\n')


class Progress:
    """Prints how much is done and the time left, every five seconds."""

    def __init__(self, what, total):
        self.what = what
        self.total = total
        self.start = self.printed = time.perf_counter()

    def __call__(self, done):
        now = time.perf_counter()
        if now - self.printed > 5 and done:
            self.printed = now
            left = (now - self.start) * (self.total / done - 1)
            print(f'{self.what}: {done:,.0f} of {self.total:,.0f}, {left:,.0f} s left', file=sys.stderr)


def read(files, what):
    """Yield (text, counts, ends) for each piece of the files. Shards yield ids instead of text."""
    progress = Progress(f'{what}, MB', sum(map(os.path.getsize, files)) / 1e6)
    done = 0
    for path in files:
        with open(path, 'rb') as file:
            stream = gzip.open(file) if path.lower().endswith('.gz') else file
            try:
                for piece in read_file(stream, path):
                    yield piece
                    progress((done + file.tell()) / 1e6)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise UserError(f'{path} is damaged or not UTF-8 ({error}): replace it') from None
        done += os.path.getsize(path)


def read_file(stream, path):
    name = path.lower().removesuffix('.gz')
    if name.endswith('.parquet'):
        table = optional('pyarrow.parquet', path).ParquetFile(stream)
        if 'text' not in table.schema.names:
            raise UserError(f'{path} has no "text" column, only {", ".join(table.schema.names)}')
        for batch in table.iter_batches(columns=['text']):
            for text in batch['text'].cast('string').to_pylist():
                yield text or '', True, True
    elif name.endswith('.bin'):
        count_shard_tokens(path)
        stream.seek(1024)
        while block := stream.read(1 << 19):
            ids = np.frombuffer(block, '<u2')
            if ids.max() >= GPT2_VOCAB:
                raise UserError(f'{path} holds the id {ids.max()}, but GPT-2 has {GPT2_VOCAB:,}')
            yield ids, True, False
    elif name.endswith(('.json', '.ndjson', '.csv', '.tsv')):
        raise UserError(f'{path} is not plain text: convert it to .jsonl, or rename it to .txt')
    elif name.endswith('.jsonl'):
        for number, line in enumerate(stream, 1):
            try:
                pieces = read_record(json.loads(line)) if line.strip() else []
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f'{path}, line {number}: {error!r}: use "text", "prompt" and "completion", '
                                'or "messages" of "role" (system, user, assistant) and "content"') from None
            yield from pieces
    else:
        with io.TextIOWrapper(stream, 'utf-8-sig') as reader:
            while lines := reader.readlines(1 << 18):
                yield ''.join(lines), True, False
            yield '', True, True


def read_record(record):
    """The pieces of a line of JSON: a text, or a conversation up to its last answer."""
    if 'messages' not in record and 'completion' not in record:
        return [('' + (record['text'] or ''), True, True)]
    messages = record.get('messages') or [dict(role='user', content=record['prompt']),
                                          dict(role='assistant', content=record['completion'])]
    pieces = []
    question = ''
    for message in messages:
        prefix = CHAT_FORM[message['role']]
        content = message['content'].strip().replace(END_CHARACTER, '?')  # or it would end there
        if message['role'] == 'assistant':
            pieces += [(question + prefix, False, False), (content, True, True)]
            question = ''
        elif content:
            question += prefix + content + '\n'
    return pieces


def count_shard_tokens(path):
    """A shard is 256 int32 (a magic number, version 1, the number of tokens, zeros), then uint16 ids."""
    header = np.fromfile(path, '<i4', 256)
    size = os.path.getsize(path)
    if len(header) < 256 or tuple(header[:2]) != (20240520, 1) or size != 1024 + 2 * int(header[2]):
        raise UserError(f'{path} is not a whole shard of GPT-2 tokens: delete it, and try again')
    return int(header[2])


def locate(source, folder):
    """The files of a source. An https address is downloaded to folder/download."""
    if re.match('https?://', source):
        name = re.split('[?#]', source)[0].rpartition('/')[2] or 'source.txt'
        prefix = hashlib.sha256(source.encode()).hexdigest()[:8]  # addresses may share a name
        path = os.path.join(folder, 'download', f'{prefix}-{name}')
        download(source, path)
        return [path]
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        raise UserError(f'source={source!r} does not exist: give a file, folder or https address')
    paths = Path(source).rglob('*')  # does not follow links to folders
    return sorted(str(path) for path in paths
                  if path.is_file() and '/.' not in f'/{path.relative_to(source).as_posix()}')


# -----------------------------------------------------------------------------
# Downloading


def lock_folder(folder, wait=False):
    """Lock a folder against other processes, until the returned file is closed or this process ends."""
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, '.lock'), 'a')
    if os.name == 'posix':
        import fcntl
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            raise UserError(f'another process is writing to {folder}: wait for it') from None
        except OSError:
            pass  # this file system has no locks
    return file


def download(url, path, sha256=None):
    """Download a file, unless it exists. An interrupted download resumes from path.part. The file gets its
    name when its length and, where it is known, its sha256 are right."""
    if os.path.exists(path):
        return
    part = path + '.part'
    with lock_folder(os.path.dirname(path), wait=True):
        if os.path.exists(path):  # another process has downloaded it
            return
        print(f'downloading {url}', file=sys.stderr)
        for pause in PAUSES:
            try:
                fetch(url, part)
                break
            except requests.RequestException as error:
                reason = error
                time.sleep(pause)
            except OSError as error:  # a full disk
                raise OSError(f'cannot write {part}: {error}') from None
        else:
            why = getattr(reason.response, 'status_code', type(reason).__name__)
            name = f'{os.path.basename(path)} from {url.split("/")[2]}'
            raise UserError(f'cannot download {name} ({why}): run the same command again to resume')
        actual = sha256 and hashlib.sha256(np.memmap(part, np.uint8, 'r')).hexdigest()
        if actual != sha256:
            os.remove(part)
            raise UserError(f'{url}: the sha256 is {actual}, not {sha256}: try again')
        os.replace(part, path)


def fetch(url, part):
    """Try once to complete the file part."""
    start = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {'Accept-Encoding': 'identity', 'Range': f'bytes={start}-'}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
        if not reply.url.startswith(('https://', 'http://127.0.0.1:')):
            raise UserError(f'{reply.url} is not secure: use https')
        if reply.status_code == 404 or reply.ok and 'text/html' in reply.headers.get('Content-Type', ''):
            raise UserError(f'{url} is not a file ({reply.status_code} {reply.reason}): check the address')
        if reply.status_code == 416:  # the partial file does not belong to this one
            os.remove(part)
        reply.raise_for_status()
        start = start if reply.status_code == 206 else 0  # 200: the whole file
        total = start + int(reply.headers.get('Content-Length', 0))
        progress = Progress('MB', total / 1e6)
        with open(part, 'ab' if start else 'wb') as file:
            for block in reply.iter_content(1 << 16):
                file.write(block)
                progress(file.tell() / 1e6)
            if file.tell() < total:
                raise requests.ConnectionError(f'received {file.tell():,} of {total:,} bytes')


# -----------------------------------------------------------------------------
# Writing bins


def prepare(dataset, source='', tokenizer='', vocab_size=4096, val_fraction=0.0, shards=0):
    """Write the bins and meta.json of a dataset that is in DATASETS or has a source."""
    row = DATASETS.get(dataset, {})
    if row and source not in ('', row['source']):
        raise UserError(f'dataset={dataset!r} has its own source: use another name, --dataset=NAME')
    if not row and not source:
        raise UserError(f'unknown dataset={dataset!r}: use {", ".join(DATASETS)} or add --source')
    source = source or row['source']
    tokenizer = tokenizer or row.get('tokenizer', 'gpt2')
    val_fraction = val_fraction or row.get('val_fraction', 0.1)
    check(dict(val_fraction=val_fraction), 'val_fraction > 0', 'val_fraction < 1')

    folder = os.path.join(DATA, dataset)
    lock = lock_folder(folder)
    sources = [source % number for number in row['shards'][:shards or None]] if 'shards' in row else [source]
    if 'val' in row:
        sources.append(row['val'])
    files = [path for source in sources for path in locate(source, folder)]
    if tokenizer != 'gpt2' and any(path.lower().endswith('.bin') for path in files):
        raise UserError(f"tokenizer={tokenizer!r}, but shards hold GPT-2's tokens: leave it out")
    spec = make_spec(tokenizer, files, vocab_size)
    tok = get_tokenizer(spec)
    check(dict(vocab_size=tok.n_vocab), 'vocab_size <= 65536')
    dtype = np.dtype('uint8' if tok.n_vocab <= 256 else '<u2')

    new = os.path.join(folder, '.new')  # files move up from here when all are complete
    shutil.rmtree(new, ignore_errors=True)
    os.mkdir(new)
    n_tokens = write_tokens(encode_files(files, tok), dtype, new)
    if n_tokens < 2:
        raise UserError(f'source={source!r} has {n_tokens} tokens: give a longer text')
    n_val = count_shard_tokens(files[-1]) if 'val' in row else max(1, round(n_tokens * val_fraction))
    n_train = max(1, n_tokens - n_val)
    is_chat = os.path.exists(os.path.join(new, 'train.mask'))
    if is_chat and tok.eot is None:
        raise UserError('this tokenizer cannot end an answer: train a new model with char, bpe or gpt2')
    split_file(new, 'bin', n_train * dtype.itemsize)
    if is_chat:
        split_file(new, 'mask', n_train)
    meta = dict(tokenizer=spec, vocab_size=tok.n_vocab, dtype=dtype.name, train_tokens=n_train,
                val_tokens=n_tokens - n_train, chat=CHAT_FORM if is_chat else None, source=source)

    names = os.listdir(new)
    with writing(os.path.join(new, 'meta.json')) as file:
        file.write(json.dumps(meta).encode())
    if os.path.exists(os.path.join(folder, 'meta.json')):  # it goes first and comes last
        print(f'replacing the dataset in {folder}')
        os.remove(os.path.join(folder, 'meta.json'))
    for name in [*names, 'meta.json']:
        os.replace(os.path.join(new, name), os.path.join(folder, name))
    os.rmdir(new)
    print(f'{dataset}: vocabulary of {tok.n_vocab:,} ({spec["type"]}), {dtype.name}\n'
          f'{n_train:,} tokens for training, {n_tokens - n_train:,} for validation')
    lock.close()


def make_spec(tokenizer, files, vocab_size):
    """The spec of a tokenizer: made from the text in files, or that of a dataset, run or checkpoint."""
    if tokenizer == 'char':
        seen = np.zeros(sys.maxunicode + 1, bool)
        for text, counts, _ in read(files, 'characters'):
            seen[code_points(text)] = True
            if not counts:  # a conversation
                seen[ord(END_CHARACTER)] = True
        return dict(type='char', chars=''.join(map(chr, np.flatnonzero(seen))))
    if tokenizer == 'bpe':
        import regex  # installed with tiktoken
        check(dict(vocab_size=vocab_size), 'vocab_size > 257', 'vocab_size <= 65536')
        words = Counter()
        n_chars = 0
        for text, *_ in read(files, 'words'):
            words.update(regex.findall(SPLIT, text))
            n_chars += len(text)
            if n_chars > 100e6:  # enough to choose the merges
                break
        return dict(type='bpe', split=SPLIT, merges=train_bpe(words, vocab_size - 257))
    if re.fullmatch('gpt2(-medium|-large|-xl)?', tokenizer):
        return dict(type='gpt2')
    for folder in (tokenizer, os.path.join(DATA, tokenizer)):
        spec = read_json(os.path.join(folder, 'meta.json')).get('tokenizer') or nanogpt_tokenizer(folder)
        if spec:
            return spec
    path = tokenizer if os.path.isfile(tokenizer) else os.path.join(tokenizer, 'ckpt.pt')
    if path.endswith('.pt') and os.path.isfile(path):
        import torch  # only here, as it takes seconds
        if spec := torch.load(path, map_location='cpu', weights_only=True).get('tokenizer'):
            return spec
    raise UserError(f'tokenizer={tokenizer!r} is not char, bpe, gpt2, a dataset, a run or a checkpoint')


def encode_files(files, tok):
    """Yield (ids, counts) for each piece of the files. tok.eot ends each document. tiktoken releases the
    GIL, so threads use all cores."""
    def encode(piece):
        text, counts, ends = piece
        ids = tok.encode(text) if isinstance(text, str) else text  # shards hold ids already
        if ends and tok.eot is not None:
            ids = np.append(ids, np.array(tok.eot, ids.dtype))
        return ids, counts
    pieces = read(files, 'tokens')
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(pieces, 64)):
            yield from pool.map(encode, batch)


def write_tokens(pieces, dtype, folder):
    """Write the ids to train.bin and, from the first piece that does not count, the mask to train.mask.
    Returns the number of tokens."""
    n_tokens = 0
    mask = None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(writing(os.path.join(folder, 'train.bin')))
        for ids, counts in pieces:
            if not counts and not mask:
                mask = stack.enter_context(writing(os.path.join(folder, 'train.mask')))
                mask.write(b'\x01' * n_tokens)
            file.write(ids.astype(dtype).tobytes())
            if mask:
                mask.write(bytes([counts]) * len(ids))
            n_tokens += len(ids)
    return n_tokens


def split_file(folder, suffix, n_bytes):
    """Move all but the first n_bytes of the train file to the val file."""
    train, val = (os.path.join(folder, f'{split}.{suffix}') for split in ('train', 'val'))
    with open(train, 'r+b') as file, writing(val) as val_file:
        file.seek(n_bytes)
        shutil.copyfileobj(file, val_file)
        file.truncate(n_bytes)


# -----------------------------------------------------------------------------
# Loading bins, and windows of them


def load_dataset(dataset):
    """Return meta and {'train': path, 'val': path} of a dataset that prepare.py or nanoGPT wrote. Checks the
    sizes of the files, but not the ids: prepare does that. The embedded text is prepared now if need be."""
    folder = os.path.join(DATA, dataset)
    bins = {split: os.path.join(folder, f'{split}.bin') for split in ('train', 'val')}
    if DATASETS.get(dataset, {}).get('source') == SHAKESPEARE and not os.path.exists(bins['train']):
        prepare(dataset)
    source = '' if dataset in DATASETS else ' --source=FILE_OR_FOLDER_OR_URL'
    advice = f'run python prepare.py --dataset={dataset}{source}'
    meta = read_json(os.path.join(folder, 'meta.json'))
    moving = os.path.exists(os.path.join(folder, '.new', 'meta.json'))  # prepare was killed as it moved files
    if not meta and not moving and os.path.exists(bins['val']):  # nanoGPT's
        spec = nanogpt_tokenizer(folder) or dict(type='gpt2')
        meta = dict(tokenizer=spec, vocab_size=len(spec['chars']) if 'chars' in spec else GPT2_VOCAB,
                    dtype='uint16')
        meta |= {f'{split}_tokens': os.path.getsize(path) // 2 for split, path in bins.items()}
    if not meta:
        raise UserError(f'{folder} is not prepared (no meta.json): {advice}')
    for split, path in bins.items():
        n_bytes = meta[f'{split}_tokens'] * np.dtype(meta['dtype']).itemsize
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != n_bytes:
            raise UserError(f'{path} holds {size:,} bytes but meta.json says {n_bytes:,}: {advice}, or '
                            'delete meta.json if nanoGPT wrote the bins')
    return meta, bins


def read_json(path):
    """The object in a JSON file, or {} if the file does not exist."""
    return json.loads(Path(path).read_text('utf-8')) if os.path.exists(path) else {}


class PlainUnpickler(pickle.Unpickler):
    """Loads dicts, lists, strings and numbers. A pickle that refers to nothing else cannot run code."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it refers to {module}.{name}')


def nanogpt_tokenizer(folder):
    """The spec of the char tokenizer in nanoGPT's meta.pkl, or None if the file does not exist."""
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        return None
    with open(path, 'rb') as file:
        itos = PlainUnpickler(file).load()['itos']
    return dict(type='char', chars=''.join(itos[i] for i in range(len(itos))))


@functools.lru_cache(maxsize=2)
def epoch_windows(n_starts, stride, seed, epoch):
    """The windows of an epoch: every stride-th of n_starts from a random offset, shuffled."""
    rng = np.random.default_rng((seed, epoch))
    count = max(1, n_starts // stride)
    offset = rng.integers(n_starts - (count - 1) * stride)
    return offset + stride * rng.permutation(count)


def shuffled_windows(n_starts, stride, seed, first, count):
    """The starts of windows first, first + 1, ... of the endless sequence of epochs."""
    per_epoch = max(1, n_starts // stride)
    epochs, places = np.divmod(np.arange(first, first + count), per_epoch)
    return np.array([epoch_windows(n_starts, stride, seed, epoch)[place]
                     for epoch, place in zip(epochs.tolist(), places, strict=True)])


def load_windows(file, dtype, starts, block_size, mask_file=None):
    """Inputs and targets, stacked: the windows of block_size tokens, and the same shifted by one. Where the
    mask is 0, targets are -1. Files are mapped anew, or pages already read would count as used memory."""
    positions = starts[:, None] + np.arange(block_size + 1)
    ids = np.memmap(file, dtype, 'r')[positions].astype(np.int64)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if mask_file:
        mask = np.memmap(mask_file, np.uint8, 'r')[positions[:, 1:]]
        targets = np.where(mask, targets, -1)
    return np.stack([inputs, targets])


if __name__ == '__main__':
    configure(globals())
    prepare(dataset, source, tokenizer, vocab_size, val_fraction, shards)
    if dataset not in DATASETS:
        print('Train on it with\npython train.py config/train_shakespeare.py '
              + shlex.join([f'--dataset={dataset}', f'--out_dir=out-{os.path.basename(dataset)}']))
