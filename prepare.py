"""
Text in, tokens out: data/NAME/train.bin and val.bin (raw uint8 or uint16 token ids) and meta.json, which says the rest.

$ python prepare.py --dataset=shakespeare_char           # the embedded text, by characters
$ python prepare.py --dataset=shakespeare                # the same, in GPT-2's tokens
$ python prepare.py --dataset=mine --source=my_texts/ --tokenizer=bpe --vocab_size=4096
$ python prepare.py --dataset=fineweb --shards=10        # FineWeb, a billion tokens of its ten

A source is a text file, .jsonl with a "text" field, either of them gzipped, .parquet with a text column, a folder of
such files, or the https address of one. Text is streamed: it may be larger than memory. Tokenizers: char, gpt2, bpe
(trained on this very text, in any language), sp:FILE.model (a SentencePiece model), data/NAME/meta.json (what that
dataset has, to finetune its models on this text).
"""
import base64
import gzip
import hashlib
import heapq
import io
import json
import os
import pickle
import re
import shutil
import sys
import threading
import time
import zlib
from array import array
from collections import Counter, defaultdict
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import islice, pairwise

import numpy as np
import requests

from configurator import UserError, check, configure, optional

dataset = 'shakespeare_char'  # the folder in data/ to write: a row of the table below, or a new name with a --source
source = ''         # where the text is; empty: what the table says
tokenizer = ''      # char, gpt2, bpe, sp:FILE.model or another dataset's meta.json; empty: the table's, else gpt2
vocab_size = 4096   # of a bpe that is trained here
val_fraction = 0.0  # the last part of the text, or the last documents, are for validation; 0: the table's, else 0.1
shards = 0          # of a dataset that comes in many files take the first so many; 0: all

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, 'data')  # os.path.join(DATA, dataset): an absolute path for dataset stands for itself
SHAKESPEARE = os.path.join(DATA, 'shakespeare', 'input.txt')
HUB = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
OWT = HUB + '/datasets/Skylion007/openwebtext/resolve/main/plain_text/train-%05d-of-00080.parquet'
FINEWEB = HUB + '/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_'
EDU = HUB + '/datasets/kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_'
DATASETS = {  # shards: the numbers for the % in source; disk: GB for each, its part of train.bin included
    'shakespeare_char': dict(source=SHAKESPEARE, tokenizer='char'),
    'shakespeare': dict(source=SHAKESPEARE),
    'openwebtext': dict(source=OWT, shards=range(80), disk=0.53, val_fraction=0.0005),
    'fineweb': dict(source=FINEWEB + 'train_%06d.bin', val=FINEWEB + 'val_000000.bin', shards=range(1, 104), disk=0.4),
    'fineweb_edu': dict(source=EDU + 'train_%06d.bin', val=EDU + 'val_000000.bin', shards=range(1, 100), disk=0.4),
}

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers. Each has n_vocab, eot (the id that ends a document, or None), encode(text) -> ids, decode_bytes(ids).

END_OF_TEXT = '<|endoftext|>'

# How text is split before pairs are merged, after GPT-4: words with the space before them, digits by threes, the rest.
# Marks (\p{M}) belong to words, or Nepali would fall apart at every vowel sign.
SPLIT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]|\s+(?!\S)|\s+")

# In every such split a token ends where space or punctuation follows a letter or digit, and after a single newline: a
# text can be cut there and its parts encoded one by one, with the same ids as the whole. This matches up to the last.
CUT = re.compile(r'(?s:.*)(?:(?<=[^\W_])(?=[\s!-/:-@，。、！？；：…—])|(?<=\S\n)(?=\S))')
CHUNK = 1 << 18  # characters of it at a time
LONGEST = 1 << 22  # characters without such a place: then they are cut anywhere, as memory has an end


def code_points(text):
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)


class CharTokenizer:
    """One id for every character."""
    eot = None

    def __init__(self, chars):
        self.chars, self.n_vocab = chars, len(chars)
        self.ids = np.full(sys.maxunicode + 1, self.n_vocab, np.min_scalar_type(self.n_vocab))  # by code point
        self.ids[code_points(chars)] = np.arange(self.n_vocab)

    def encode(self, text, special=False):
        ids = self.ids.take(code_points(text))
        if len(ids) and ids.max() == self.n_vocab:
            unknown = ' '.join(repr(c) for c in sorted(set(text) - set(self.chars))[:20])
            raise UserError(f'the tokenizer does not know {unknown}: it has only the {self.n_vocab} characters of the '
                            'text it was made from, so leave these out')
        return ids

    def decode_bytes(self, ids):
        return ''.join(self.chars[i] for i in ids).encode('utf-8', 'replace')


class BPETokenizer:
    """Byte-level byte-pair encoding, done by tiktoken: any text whatever can be encoded."""

    def __init__(self, encoding):
        self.encoding, self.n_vocab, self.eot = encoding, encoding.n_vocab, encoding.eot_token

    def encode(self, text, special=False):
        """With special, <|endoftext|> in the text is the token; otherwise it is text like any other."""
        text = text.encode('utf-8', 'replace').decode('utf-8')  # a lone surrogate cannot be encoded
        try:
            return self.encoding.encode_to_numpy(text, allowed_special={END_OF_TEXT} if special else set(),
                                                 disallowed_special=())
        except ValueError as error:
            raise UserError(f'the text cannot be split ({error}): has it a million blanks in a row?') from None

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes([int(i) for i in ids])

    def huggingface_files(self):
        """The files of which transformers makes the same tokenizer: {name: content}."""
        visible, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
        letters = [b if b in visible else next(others) for b in range(256)]  # as GPT-2's files write bytes
        pieces = [self.encoding.decode_single_token_bytes(i) for i in range(self.n_vocab) if i != self.eot]
        known = {piece: piece.decode('latin-1').translate(letters) for piece in pieces}
        merges = [(known[piece[:i]], known[piece[i:]]) for piece in pieces for i in range(1, len(piece))
                  if piece[:i] in known and piece[i:] in known]  # tiktoken merges whatever makes a piece
        end = dict(id=self.eot, content=END_OF_TEXT, special=True, normalized=False, single_word=False, lstrip=False,
                   rstrip=False)
        split = dict(type='Split', pattern=dict(Regex=self.encoding._pat_str), behavior='Isolated', invert=False)
        byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
        vocab = {letter: i for i, letter in enumerate([*known.values(), END_OF_TEXT])}
        return {
            'tokenizer.json': dict(
                version='1.0', added_tokens=[end], model=dict(type='BPE', vocab=vocab, merges=merges),
                pre_tokenizer=dict(type='Sequence', pretokenizers=[split, byte_level]), decoder=byte_level),
            'tokenizer_config.json': dict(
                tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False, bos_token=END_OF_TEXT,
                eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)}


class SentencePieceTokenizer:
    """A SentencePiece model as it is: what its normalisation drops (newlines, usually) or does not know is lost."""

    def __init__(self, model):
        self.sp = optional('sentencepiece', 'this tokenizer').SentencePieceProcessor(model_proto=model)
        self.n_vocab = self.sp.get_piece_size()
        self.eot = self.sp.eos_id() if self.sp.eos_id() >= 0 else None

    def encode(self, text, special=False):
        return np.array(self.sp.encode(text), np.uint32)

    def decode_bytes(self, ids):
        found = b''
        for i in map(int, ids):
            piece = '' if self.sp.is_control(i) else self.sp.id_to_piece(i)
            found += bytes.fromhex(piece[3:-1]) if self.sp.is_byte(i) else piece.replace('\u2581', ' ').encode()
        return found


def get_tokenizer(spec):
    """The tokenizer that a spec (in meta.json and in every checkpoint) describes, all of it."""
    import tiktoken
    try:
        if spec['type'] == 'char':
            return CharTokenizer(spec['chars'])
        if spec['type'] == 'gpt2':
            return BPETokenizer(tiktoken.get_encoding('gpt2'))
        if spec['type'] == 'sp':
            return SentencePieceTokenizer(base64.b64decode(spec['model']))
        if spec['type'] == 'bpe':
            pieces = [bytes([i]) for i in range(256)]
            for left, right in spec['merges']:
                pieces.append(pieces[left] + pieces[right])
            return BPETokenizer(tiktoken.Encoding(
                'bpe', pat_str=spec['split'], special_tokens={END_OF_TEXT: len(pieces)},
                mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)}))
    except OSError as error:
        raise UserError(f"tiktoken could not download GPT-2's tokenizer, as it does once ({type(error).__name__}): run "
                        'this with a network, or set TIKTOKEN_CACHE_DIR to a folder that it has filled elsewhere, or '
                        'train a tokenizer here with --tokenizer=bpe') from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(f'the tokenizer, of meta.json, a checkpoint or a .model, is damaged ({type(error).__name__}: '
                        f'{str(error)[:80]}): prepare the dataset, or get the file, again') from None
    if spec['type'] == 'unknown':
        raise UserError("these weights were trained with a tokenizer that is not GPT-2's and that we cannot read")
    raise UserError(f"tokenizer {spec['type']!r}: choose char, gpt2, bpe or sp:FILE.model")


def make_spec(tokenizer, files, vocab_size):
    """The spec of a tokenizer for the text in files: what get_tokenizer needs."""
    if tokenizer == 'char':
        seen = np.zeros(sys.maxunicode + 1, bool)
        for text, _ in read(files, 'characters'):
            seen[code_points(text)] = True
        return dict(type='char', chars=''.join(map(chr, np.flatnonzero(seen))))
    if tokenizer == 'bpe':
        import regex  # which tiktoken depends on: the same syntax as its own
        if vocab_size < 258:
            raise UserError(f'vocab_size={vocab_size}: a bpe starts from 256 bytes and {END_OF_TEXT}, so at least 258')
        words, learned = Counter(), 0
        for text, _ in read(files, 'words'):
            words.update(regex.findall(SPLIT, text))
            learned += len(text)
            if learned > 100e6:  # as good as all of it, and bounded in memory
                break
        merges = train_bpe(words, vocab_size - 257)
        if len(merges) < vocab_size - 257:
            print(f'after {len(merges)} merges no pair occurs twice: the text has no use for vocab_size={vocab_size}')
        return dict(type='bpe', split=SPLIT, merges=merges)
    if tokenizer.startswith('sp:'):
        try:
            with open(tokenizer[3:], 'rb') as f:
                return dict(type='sp', model=base64.b64encode(f.read()).decode())
        except OSError as error:
            raise UserError(f'tokenizer={tokenizer}: {error}') from None
    if tokenizer.endswith(('.json', 'meta.pkl')):
        folder, name = os.path.split(tokenizer)
        if spec := nanogpt_tokenizer(folder) if name == 'meta.pkl' else read_json(tokenizer).get('tokenizer'):
            return spec
        raise UserError(f'tokenizer={tokenizer}: there is no such file, or no tokenizer in it')
    return dict(type=tokenizer)


def train_bpe(words, n_merges):
    """Merge the most frequent pair of neighbours into a new id, n_merges times; of equals the lowest ids come first.

    words counts each distinct word. In sequences a word is a string with a character for each id, so that a merge is
    its replace(). It touches only the words that contain its pair, and only the counts of the pairs that it makes or
    breaks. The heap holds stale counts too, which are recognised when they come up."""
    sequences = [(word.encode('utf-8', 'replace').decode('latin-1'), n) for word, n in words.items()]
    counts, places = Counter(), defaultdict(set)  # of each pair: how often, and in which words
    for i, (ids, n) in enumerate(sequences):
        for pair in pairwise(ids):
            counts[pair] += n
            places[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    pieces, merges = [bytes([i]) for i in range(256)], []
    known, progress = set(pieces), Progress('merges', n_merges, 'merges')
    while heap and heap[0][0] < -1 and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        left, right = map(ord, pair)
        piece = pieces[left] + pieces[right]
        if -n != counts[pair] or piece in known:  # stale, or another way to spell a piece that exists
            continue
        pieces.append(piece)
        known.add(piece)
        merges.append((left, right))
        change = Counter()
        for i in places.pop(pair):
            ids, n = sequences[i]
            merged = ids.replace(''.join(pair), chr(len(pieces) - 1))
            for old in pairwise(ids):
                change[old] -= n
            for made in pairwise(merged):
                change[made] += n
                places[made].add(i)
            sequences[i] = merged, n
        for p, n in change.items():
            counts[p] += n
            if n:
                heapq.heappush(heap, (-counts[p], p))
        progress(len(merges))
    return merges


# ---------------------------------------------------------------------------------------------------------------------
# Sources.

class Progress:
    """How much is done of what, rate and time left: one line on stderr, from the second second on."""

    def __init__(self, what, total, unit):
        self.what, self.total, self.unit, self.begin, self.shown = what, total, unit, time.time(), None

    def __call__(self, done, finished=False):
        now, terminal = time.time(), sys.stderr.isatty()
        wait = 1 if terminal or not self.shown else 10
        if now - (self.shown or self.begin) < wait and not (finished and self.shown):
            return
        self.shown = now
        scale = 1e6 if self.unit == 'MB' else 1
        rate = max(done, 1) / (now - self.begin)
        total = f' of {self.total / scale:,.0f}' if self.total else ''
        left = f', {max(0, self.total - done) / rate:,.0f} s left' if self.total and not finished else ''
        print(f'{self.what}: {done / scale:,.0f}{total} {self.unit}, {rate / scale:,.1f} {self.unit}/s{left}',
              end='\x1b[K\r' if terminal and not finished else '\n', file=sys.stderr, flush=True)


PAUSES = 0.5, 1, 2, 4, 0  # seconds, after each try


def download(urls, digest=None, check=None):
    """Fetch {path: url}, several side by side. A path appears when its file is whole: of the length and the sha256 that
    the server names (or of this digest), and nothing that check(file) refuses. What breaks off is retried and resumes
    from path.part, in a later run too."""
    come, sizes, stop = dict.fromkeys(urls, 0), dict.fromkeys(urls, 0), threading.Event()  # bytes, of each file

    def complete(path, url):
        for pause in PAUSES:
            try:
                return fetch(path, url, digest, check, come, sizes, stop)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = error
                stop.wait(pause)
        reason = getattr(problem.args[0], 'reason', problem) if problem.args else problem  # the innermost one
        raise UserError(f'{url}: given up after {len(PAUSES)} tries ({reason}): run the same command again to go on '
                        'where it stopped')

    what = os.path.basename(next(iter(urls))) if len(urls) == 1 else f'{len(urls)} files'
    progress = Progress(f'downloading {what}', 0, 'MB')
    with ThreadPoolExecutor(8) as pool:
        jobs = left = [pool.submit(complete, path, url) for path, url in urls.items()]
        try:
            while left:
                done, left = wait(jobs, 1, FIRST_EXCEPTION)
                for job in done:
                    job.result()  # raises what went wrong there
                known = [size for size in sizes.values() if size]
                progress.total = len(urls) * sum(known) / max(1, len(known))
                progress(sum(come.values()), finished=not left)
        finally:  # if one has failed, or on Ctrl-C, the others stop too
            stop.set()
            pool.shutdown(cancel_futures=True)


def check_secure(url):
    if not re.match(r'https://|http://(127\.0\.0\.1|localhost)[:/]', url):
        raise UserError(f'{url}: over http anybody on the way can change a file: use https')


def fetch(path, url, digest, check, come, sizes, stop):
    """One try to complete path.part and give it its name. Raises a ConnectionError if another may go better."""
    check_secure(url)
    part = path + '.part'
    have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {'Accept-Encoding': 'identity', 'Range': f'bytes={have}-'}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
        code, hops, span = reply.status_code, [*reply.history, reply], reply.headers.get('Content-Range', '')
        for hop in hops:
            check_secure(hop.url)
        misfit = code == 416 or code == 206 and not span.startswith(f'bytes {have}-')  # our part is not a part of that
        if misfit:
            open(part, 'wb').close()
        if misfit or code in (408, 429) or code >= 500:
            raise requests.ConnectionError(f'the server answered {code} {reply.reason}')
        if code not in (200, 206):
            raise UserError(f'{url}: the server answered {code} {reply.reason}: check the address')
        if 'text/html' in reply.headers.get('Content-Type', ''):
            raise UserError(f'{url} is a web page, not a data file: give the address of the file itself')
        if code == 200:
            have = 0  # all of it comes again
        length = int(reply.headers.get('Content-Length', 0))
        check_space(os.path.dirname(path), length)
        sizes[path] = come[path] + length
        with open(part, 'ab' if have else 'wb') as f:
            for block in reply.iter_content(1 << 16):  # what a break cuts short is lost
                f.write(block)
                come[path] += len(block)
                if stop.is_set():
                    raise UserError(f'{url}: stopped')
            if f.tell() < have + length:
                raise requests.ConnectionError(f'{f.tell():,} of {have + length:,} bytes came')
        named = re.fullmatch('"?([0-9a-f]{64})"?', hops[0].headers.get('X-Linked-ETag', ''))  # so Hugging Face does
    try:
        wanted = digest or named and named[1]
        if wanted and sha256([part]) != wanted:
            raise UserError(f'its sha256 is {sha256([part])}, not {wanted}')
        if check:
            check(part)
    except UserError as error:
        os.remove(part)
        raise UserError(f'{url}: what came is not what should ({error}): try again, or another network') from None
    os.replace(part, path)


def check_space(folder, size):
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f'{folder} has {free / 1e9:,.1f} GB free, but {size / 1e9:,.1f} GB are to come: make room, or '
                        'put a link to a larger disk there')


def locate(source, folder, row, shards):
    """The files of a source, those that have an address downloaded into folder first."""
    if re.match('https?://', source):
        urls, prefix = [source], hashlib.sha256(source.encode()).hexdigest()[:8] + '-'  # two may have the same name
        if source == row.get('source'):
            urls, prefix = [source % i for i in row['shards'][:shards or None]] + [row['val']] * ('val' in row), ''
        names = [re.split('[?#]', url)[0].rpartition('/')[2] or 'source.txt' for url in urls]
        urls = {os.path.join(folder, 'download', prefix + name): url for name, url in zip(names, urls, strict=True)}
        there = sum(os.path.getsize(p) for path in urls for p in (path, path + '.part') if os.path.exists(p))
        check_space(folder, row.get('disk', 0) * 1e9 * len(urls) - there)
        download({path: url for path, url in urls.items() if not os.path.exists(path)},
                 check=shard_tokens if source.endswith('.bin') else None)
        return list(urls)
    if os.path.isdir(source):
        ignored = r'/\.|\.(bin|tmp|part)$|meta\.json$'  # hidden files and folders, and what we write
        files = [os.path.join(base, name) for base, _, names in os.walk(source) for name in names]
        return sorted(path for path in files
                      if os.path.isfile(path) and not re.search(ignored, '/' + os.path.relpath(path, source)))
    if os.path.isfile(source):
        return [source]
    raise UserError(f'source={source!r}: no such file or folder')


def shard_tokens(path):
    """How many tokens are in a shard: 256 int32 (a magic number, version 1, that count, zeros), then uint16 ids."""
    header, size = np.fromfile(path, '<i4', 256), os.path.getsize(path)
    if len(header) < 256 or tuple(header[:2]) != (20240520, 1) or size != 1024 + 2 * int(header[2]):
        raise UserError(f'{path} is not a whole shard of GPT-2 tokens: its header is {header[:3].tolist()} and it has '
                        f'{size:,} bytes')
    return int(header[2])


def read(files, what):
    """Yield (text, ends): pieces of text (ids, from shards), and whether the document ends with it. Shows progress."""
    progress, done = Progress(what, sum(map(os.path.getsize, files)), 'MB'), 0
    for path in files:
        with open(path, 'rb') as raw:
            unzipped = gzip.open(raw) if path.lower().endswith('.gz') else raw
            try:
                for piece in read_file(unzipped, path):
                    yield piece
                    progress(done + raw.tell())
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise UserError(f'{path} is damaged or not UTF-8 text ({error}): get it again, convert it, e.g. with '
                                'iconv -t utf-8, or move it out of the folder') from None
            done += os.path.getsize(path)
    progress(done, finished=True)


def read_file(f, path):
    kind = path.lower().removesuffix('.gz').rpartition('.')[2]
    if kind == 'parquet':
        table = optional('pyarrow.parquet', path).ParquetFile(f)
        if 'text' not in table.schema.names:
            raise UserError(f'{path} has no column "text", only {", ".join(table.schema.names)}')
        for batch in table.iter_batches(columns=['text']):
            for text in batch['text'].to_pylist():
                yield str(text or ''), True
    elif kind == 'bin':
        shard_tokens(path)
        f.seek(1024)
        while block := f.read(2 * CHUNK):
            yield np.frombuffer(block, '<u2'), False
    elif kind == 'jsonl':
        with io.TextIOWrapper(f, 'utf-8-sig') as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = json.loads(line)['text'] if line.strip() else ''
                    text = text.encode('utf-8', 'replace').decode()  # JSON can hold half characters
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise UserError(f'{path}, line {number}: not a JSON object with a "text" field') from None
                yield text, True
    else:
        rest = ''
        with io.TextIOWrapper(f, 'utf-8-sig') as lines:
            while more := lines.read(CHUNK):
                text = rest + more
                place = CUT.match(text, len(rest))  # there is none in the rest
                cut = place.end() if place else len(text) if len(text) > LONGEST else 0
                yield text[:cut], False
                rest = text[cut:]
            yield rest, True


# ---------------------------------------------------------------------------------------------------------------------
# Bins.

def prepare(dataset, source='', tokenizer='', vocab_size=4096, val_fraction=0.0, shards=0):
    """Write train.bin, val.bin and meta.json for a dataset: a row of DATASETS or any other text. Returns meta."""
    row, folder = DATASETS.get(dataset, {}), os.path.join(DATA, dataset)
    if row and source not in ('', row['source']):
        raise UserError(f'dataset={dataset!r} has a text of its own: give {source} another name with --dataset=NAME')
    source, tokenizer = source or row.get('source'), tokenizer or row.get('tokenizer', 'gpt2')
    val_fraction = val_fraction or row.get('val_fraction', 0.1)
    if not source:
        raise UserError(f'dataset={dataset!r} is not one of {", ".join(DATASETS)}: say where its text is with '
                        '--source=FILE_OR_FOLDER_OR_URL')
    check(dict(val_fraction=val_fraction, shards=shards), 'val_fraction > 0', 'val_fraction < 1', 'shards >= 0')
    if shards and 'shards' not in row:
        raise UserError(f'shards={shards}, but {source} does not come in shards: leave it out')
    tokenized = source.endswith('.bin')
    if tokenized and tokenizer != 'gpt2':
        raise UserError(f"tokenizer={tokenizer!r}, but {source} is in GPT-2's tokens already: leave it out")
    if source.endswith('.parquet'):
        optional('pyarrow.parquet', source)  # better now than after the download
    files = locate(source, folder, row, shards)
    if not any(map(os.path.getsize, files)):
        raise UserError(f'source={source!r} is empty: there is no text in it')
    spec = make_spec(tokenizer, files, vocab_size)
    tok = get_tokenizer(spec)
    if tok.n_vocab > 65536:
        raise UserError(f'the tokenizer has {tok.n_vocab:,} tokens; bins hold ids of 16 bits: at most 65,536')
    dtype = np.dtype('uint8' if tok.n_vocab <= 256 else '<u2')
    encode = (lambda ids: ids) if tokenized else tok.encode

    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, name) for name in ('train.bin', 'val.bin', 'meta.json')]
    train, val, meta = [path + '.tmp' for path in paths]  # nothing has its final name before all of it is there
    separator = [] if tok.eot is None else [tok.eot]
    n, starts, between = 0, array('q'), False  # tokens so far; where documents start; whether one has just ended
    with open(train, 'wb') as f, ThreadPoolExecutor() as pool:
        pieces = read(files, 'tokens')
        while some := list(islice(pieces, 64)):  # tiktoken works outside Python's lock, so threads use every core
            for ids, (_, ends) in zip(pool.map(encode, [text for text, _ in some]), some, strict=True):
                if between and len(ids):
                    ids, between = np.concatenate((separator, ids)), False
                    starts.append(n + len(separator))
                f.write(ids.astype(dtype, copy=False).data)
                n += len(ids)
                between = between or (ends and n > 0)
    if n < 2:
        raise UserError(f'source={source!r} is {n} tokens long: there is nothing to learn in it')
    n_val = shard_tokens(files[-1]) if 'val' in row else min(max(1, round(n * val_fraction)), n - 1)
    near = (start for start in starts if abs(n - n_val - start) <= n_val / 2)  # better than in a document's middle
    cut = min(near, key=lambda start: abs(n - n_val - start), default=n - n_val)
    held_out = sum(start >= cut for start in starts)
    with open(train, 'r+b') as f, open(val, 'wb') as out:
        f.seek(cut * dtype.itemsize)
        shutil.copyfileobj(f, out)
        f.truncate(cut * dtype.itemsize)
    facts = dict(tokenizer=spec, vocab_size=tok.n_vocab, dtype=dtype.name, train_tokens=cut, val_tokens=n - cut,
                 source=source, source_sha256=sha256(files))
    with open(meta, 'w', encoding='utf-8') as f:
        json.dump(facts, f)
    for path in paths:
        os.replace(path + '.tmp', path)
    print(f'{folder}: {cut:,} tokens to train on, {n - cut:,} for validation'
          + f' (the last {held_out} of {len(starts) + 1} documents)' * (cut in starts)
          + f', vocabulary {tok.n_vocab:,} ({tokenizer}), {dtype.name}')
    return facts


def sha256(files):
    digest = hashlib.sha256()
    for path in files:
        with open(path, 'rb') as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_json(path):
    """The object in a JSON file, or {} where there is no such file."""
    try:
        with open(path, encoding='utf-8') as f:
            found = json.load(f)
            if not isinstance(found, dict):
                raise TypeError('it is not an object')
            return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({error}): make or get it again') from None


class PlainUnpickler(pickle._Unpickler):
    """Knows only the opcodes of dicts, lists, strings and numbers: whatever a file says, nothing else can come of it.
    Made of Python's own unpickler, since the faster one in C takes as much memory as a file merely asks for."""
    plain = ('PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET EMPTY_DICT DICT SETITEM '
             'SETITEMS EMPTY_LIST LIST APPEND APPENDS UNICODE BINUNICODE SHORT_BINUNICODE NONE NEWTRUE NEWFALSE '
             'INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT')
    dispatch = {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in plain.split())}


def nanogpt_tokenizer(folder):
    """The spec of the characters in a meta.pkl of nanoGPT's, or None where there is none."""
    path = os.path.join(folder, 'meta.pkl')
    try:
        with open(path, 'rb') as f:
            itos = PlainUnpickler(io.BytesIO(f.read(1 << 26))).load()['itos']
        chars = ''.join(itos[i] for i in range(len(itos)))
        if not len(chars) == len(set(chars)) == len(itos) > 0:
            raise ValueError('itos is not characters, each one once')
        return dict(type='char', chars=chars)
    except FileNotFoundError:
        return None
    except Exception as error:  # an unpickler has many ways to say that a file is damaged
        raise UserError(f'{path} is damaged or not of a char dataset of nanoGPT ({type(error).__name__}: {error}): '
                        'it may hold plain dicts, lists, strings and numbers only') from None


def load_dataset(dataset, scan=True):
    """A prepared dataset's meta and the paths of its bins, checked: sizes as meta says, and if scan, that all ids are
    in the vocabulary. A folder that nanoGPT's scripts prepared has no meta.json, and ids of 16 bits always."""
    again = f'run python prepare.py --dataset={dataset}' + ' --source=FILE_OR_FOLDER_OR_URL' * (dataset not in DATASETS)
    folder, splits = os.path.join(DATA, dataset), ('train', 'val')
    path, bins = os.path.join(folder, 'meta.json'), {split: os.path.join(folder, f'{split}.bin') for split in splits}
    sizes = {split: os.path.getsize(bins[split]) if os.path.exists(bins[split]) else 0 for split in splits}
    meta = read_json(path)
    if not os.path.exists(path):
        if not all(sizes.values()) or os.path.exists(path + '.tmp'):
            raise UserError(f'{folder} is not prepared (no meta.json): {again}')
        spec = nanogpt_tokenizer(folder) or dict(type='gpt2')
        meta = dict(tokenizer=spec, vocab_size=len(spec.get('chars', range(50257))), dtype='uint16',
                    **{f'{split}_tokens': sizes[split] // 2 for split in splits})
    try:
        width, n_vocab = {'uint8': 1, 'uint16': 2}[meta['dtype']], meta['vocab_size']
        expected = {split: meta[f'{split}_tokens'] for split in splits}
        if not all(isinstance(n, int) and n > 0 for n in (n_vocab, *expected.values())):
            raise ValueError('a count that is not a whole number')
        if meta['tokenizer']['type'] in ('char', 'bpe') and get_tokenizer(meta['tokenizer']).n_vocab != n_vocab:
            raise ValueError(f'the tokenizer has not {n_vocab} ids')
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__}: {error}): {again}') from None
    for split, bin in bins.items():
        if sizes[split] != expected[split] * width:
            raise UserError(f'{bin} holds {sizes[split]:,} bytes but meta.json says {expected[split] * width:,} '
                            f'({meta["dtype"]} x {expected[split]:,} tokens): {again}')
        for start in range(0, expected[split] if scan else 0, 1 << 26):  # each mapped anew: mapped pages are memory
            ids = np.memmap(bin, meta['dtype'], 'r')[start:start + (1 << 26)]
            if ids.max() >= n_vocab:
                raise UserError(f'{bin} holds the id {ids.max()}, beyond the vocabulary of {n_vocab:,}: {again}')
    return meta, bins


if __name__ == '__main__':
    configure(globals())
    prepare(dataset, source, tokenizer, vocab_size, val_fraction, shards)
