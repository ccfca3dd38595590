"""
Turn text into tokens: data/NAME/train.bin and val.bin (raw uint8 or uint16 ids)
and meta.json (the tokenizer and the counts). For conversations it also writes
train.mask and val.mask, which mark the tokens that the loss counts.

$ python prepare.py --dataset=shakespeare_char  # the embedded text, by chars
$ python prepare.py --dataset=shakespeare       # the same in GPT-2's tokens
$ python prepare.py --dataset=mine --source=my_texts/ --tokenizer=bpe
$ python prepare.py --dataset=qa --source=qa.jsonl # questions and answers
$ python prepare.py --dataset=fineweb --shards=10 # a billion tokens of FineWeb

A source is a text file, a .jsonl file (both may be gzipped), a .parquet file
with a "text" column, a folder of such files, or an https address. Text is
streamed, so it can exceed memory.

Each line of a .jsonl file is an object with "text"; or, for conversations, with
"prompt" and "completion", or with "messages", each with "role" (system, user or
assistant) and "content".

Tokenizers: char, gpt2, bpe (byte-pair encoding trained on the source), or that
of a run, a checkpoint or another dataset, to finetune a model on this text.
"""
import glob
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
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise

import numpy as np
import requests

from configurator import UserError, check, configure, optional

dataset = 'shakespeare_char'  # a dataset of the table in this file, or a new name with --source
source = ''         # file, folder or https address of the text; '': the dataset's own
tokenizer = ''      # char, gpt2, bpe, a run or a dataset; '': the dataset's own, or gpt2
vocab_size = 4096   # vocabulary size of a bpe tokenizer
val_fraction = 0.0  # fraction of tokens held out, from the end; 0: the dataset's own, or 0.1
shards = 0          # number of shards to download of a large dataset; 0: all

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')
SHAKESPEARE = os.path.join(DATA, 'shakespeare', 'input.txt')
HUB = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
OWT = HUB + '/datasets/Skylion007/openwebtext/resolve/main/plain_text/train-%05d-of-00080.parquet'
FINEWEB = HUB + '/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_'
EDU = HUB + '/datasets/kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_'
DATASETS = {  # shards: numbers that replace the % in source; disk: GB per shard, including its tokens
    'shakespeare_char': dict(source=SHAKESPEARE, tokenizer='char'),
    'shakespeare': dict(source=SHAKESPEARE),
    'openwebtext': dict(source=OWT, shards=range(80), disk=0.53, val_fraction=0.0005),
    'fineweb': dict(source=FINEWEB + 'train_%06d.bin', shards=range(1, 104), disk=0.4,
                    val=FINEWEB + 'val_000000.bin'),
    'fineweb_edu': dict(source=EDU + 'train_%06d.bin', shards=range(1, 100), disk=0.4,
                        val=EDU + 'val_000000.bin'),
}

# -----------------------------------------------------------------------------
# Tokenizers. Each has n_vocab, eot (the id that separates documents, or None),
# encode(text) and decode_bytes(ids).

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
            raise UserError(f'unknown to the tokenizer: {unknown}; remove from the text')
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
        try:
            return self.encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except ValueError as error:
            raise UserError(f'cannot tokenize the text ({error}): shorten long runs of spaces') from None

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
    try:
        kind = spec['type']
        if kind == 'char':
            return CharTokenizer(spec['chars'])
        if kind == 'gpt2':
            return BPETokenizer(tiktoken.get_encoding('gpt2'))
        if kind == 'bpe':
            pieces = [bytes([byte]) for byte in range(256)]
            for left, right in spec['merges']:
                pieces.append(pieces[left] + pieces[right])
                if len(pieces[-1]) > 10_000:
                    raise ValueError(f'a token of {len(pieces[-1]):,} bytes')
            ranks = {piece: rank for rank, piece in enumerate(pieces)}
            special = {END_OF_TEXT: len(pieces)}
            return BPETokenizer(tiktoken.Encoding(
                'bpe', pat_str=spec['split'], mergeable_ranks=ranks, special_tokens=special))
    except OSError as error:
        raise UserError("cannot download GPT-2's tokenizer: connect to the internet, or set "
                        'TIKTOKEN_CACHE_DIR to a folder that has it') from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(f'the tokenizer is damaged ({str(error)[:80]}): prepare the dataset again') from None
    if kind == 'unknown':
        raise UserError("these weights were trained with an unknown tokenizer, not GPT-2's")
    raise UserError(f'unknown tokenizer {kind!r}: choose char, gpt2 or bpe')


def train_bpe(words, n_merges):
    """Learn up to n_merges pairs of ids to merge from {word: count}. The definition:

        ids = {word: list(word.encode()) for word in words}
        for new_id in range(256, 256 + n_merges):
            counts = Counter()
            for word, n in words.items():
                for pair in pairwise(ids[word]):
                    counts[pair] += n
            best = min(counts, key=lambda pair: (-counts[pair], pair))  # ties: the lowest ids
            merges.append(best)
            for word in words:
                ids[word] = replace(ids[word], best, new_id)

    Counting all pairs again is slow, so the code below updates only the counts that a merge changes.
    It stops when no pair occurs twice, and skips a pair that spells an existing token."""
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
    progress = Progress('merges', n_merges, 'merges')
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
        progress(len(merges))
    return merges


# -----------------------------------------------------------------------------
# Reading sources

# Where text can be cut without changing its BPE ids: after a letter or digit if white space or punctuation
# follows, and after a single newline. The pattern matches everything up to the last such place.
CUT = re.compile(r'(?s:.*)(?:(?<=[^\W_])(?=[\s!-/:-@，。、！？；：…—])|(?<=\S\n)(?=\S))')
CHUNK = 1 << 18    # characters to read at a time
LONGEST = 1 << 22  # characters after which text is cut anywhere, to bound memory


class Progress:
    """Prints how much is done, the rate and the time left, every five seconds."""

    def __init__(self, what, total, unit):
        self.what = what
        self.total = total
        self.unit = unit
        self.start = self.printed = time.time()

    def __call__(self, done):
        now = time.time()
        if now - self.printed > 5 and done:
            self.printed = now
            rate = done / (now - self.start)
            left = max(0, self.total - done) / rate
            print(f'{self.what}: {done:,.0f} of {self.total:,.0f} {self.unit}, {rate:,.1f} {self.unit}/s, '
                  f'{left:,.0f} s left', file=sys.stderr, flush=True)


def read(files, what):
    """Yield (text, ends_document, mark) for each piece of the files. The mark is QUESTION or ANSWER in a
    conversation, and None in plain text. Shards yield arrays of ids instead of text."""
    marks = set()
    progress = Progress(what, sum(map(os.path.getsize, files)) / 1e6, 'MB')
    done = 0
    for path in files:
        with open(path, 'rb') as file:
            stream = gzip.open(file) if path.lower().endswith('.gz') else file
            try:
                for text, ends_document, mark in read_file(stream, path):
                    if len(text) > 0:
                        marks.add(mark)
                    if None in marks and len(marks) > 1:
                        kind = 'plain text' if mark is None else 'conversations'
                        raise UserError(f'{path} holds {kind}, unlike what comes before: separate them')
                    yield text, ends_document, mark
                    progress((done + file.tell()) / 1e6)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise UserError(f'{path} is damaged or not UTF-8 ({error}): replace or convert it') from None
        done += os.path.getsize(path)


def read_file(stream, path):
    name = path.lower().removesuffix('.gz')
    if name.endswith('.parquet'):
        table = optional('pyarrow.parquet', path).ParquetFile(stream)
        if 'text' not in table.schema.names:
            raise UserError(f'{path} has no "text" column, only {", ".join(table.schema.names)}')
        for batch in table.iter_batches(columns=['text']):
            for text in batch['text'].to_pylist():
                yield str(text or ''), True, None
    elif name.endswith('.bin'):
        count_shard_tokens(path)
        stream.seek(1024)
        while block := stream.read(2 * CHUNK):
            ids = np.frombuffer(block, '<u2')
            if ids.max() >= GPT2_VOCAB:
                raise UserError(f'{path} holds the id {ids.max()}, but GPT-2 has {GPT2_VOCAB:,}: replace it')
            yield ids, False, None
    elif name.endswith('.jsonl'):
        with io.TextIOWrapper(stream, 'utf-8-sig') as lines:
            for number, line in enumerate(lines, 1):
                try:
                    pieces = read_record(json.loads(line)) if line.strip() else []
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    problem = error if type(error) is ValueError else 'not JSON, or a field is missing'
                    raise UserError(f'{path}, line {number}: {problem}: use "text", "prompt" and '
                                    '"completion", or "messages" of "role" and "content"') from None
                yield from pieces
    else:
        rest = ''
        with io.TextIOWrapper(stream, 'utf-8-sig') as reader:
            while block := reader.read(CHUNK):
                text = rest + block
                cut = CUT.match(text, len(rest))  # rest has no place to cut
                end = cut.end() if cut else 0
                if not cut and len(text) > LONGEST:
                    end = len(text)
                yield text[:end], False, None
                rest = text[end:]
            yield rest, True, None


# How a conversation is written: what precedes a message of each role. A newline ends a question, the end of
# text an answer. Checkpoints contain this, so that sample.py asks in the same form.
CHAT_FORM = dict(system='', user='User: ', assistant='Assistant:\n')
QUESTION, ANSWER, DOCUMENT_START = range(3)  # what the mask says of a token; only ANSWER counts in the loss


def read_record(record):
    """The pieces of a line of JSON: a text, or a conversation up to its last answer."""
    if record.get('messages'):
        messages = record['messages']
    elif record.get('completion') is not None:
        messages = [dict(role='user', content=record['prompt']),
                    dict(role='assistant', content=record['completion'])]
    else:
        text = record['text'].encode('utf-8', 'replace').decode()  # JSON can hold lone surrogates
        return [(text, True, None)]
    pieces = []
    question = ''
    for message in messages:
        role, content = message['role'], message['content']
        if role not in CHAT_FORM:
            raise ValueError(f'the role {role!r} is not {", ".join(CHAT_FORM)}')
        if not isinstance(content, str):
            raise ValueError('content is not a string')
        content = content.encode('utf-8', 'replace').decode().strip()
        if role == 'assistant':
            if not content:
                raise ValueError('an empty answer')
            pieces += [(question + CHAT_FORM[role], False, QUESTION), (content, False, ANSWER)]
            question = ''
        elif content:
            question += CHAT_FORM[role] + content + '\n'
    if not pieces:
        raise ValueError('no answer')
    last_answer = pieces[-1][0]
    pieces[-1] = last_answer, True, ANSWER
    return pieces


def count_shard_tokens(path):
    """A shard is 256 int32 (a magic number, version 1, the number of tokens, zeros), then uint16 ids."""
    header = np.fromfile(path, '<i4', 256)
    size = os.path.getsize(path)
    if len(header) < 256 or tuple(header[:2]) != (20240520, 1) or size != 1024 + 2 * int(header[2]):
        raise UserError(f'{path} is not a whole shard of GPT-2 tokens: replace it')
    return int(header[2])


def locate(source, folder):
    """The files of a source. An https address is downloaded to folder/download."""
    if re.match('https?://', source):
        name = re.split('[?#]', source)[0].rpartition('/')[2] or 'source.txt'
        prefix = hashlib.sha256(source.encode()).hexdigest()[:8]  # another address may have the same name
        path = os.path.join(folder, 'download', f'{prefix}-{name}')
        download({path: source})
        return [path]
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        raise UserError(f'source={source!r} does not exist: give a file, folder or https address')
    paths = glob.glob(os.path.join(glob.escape(source), '**'), recursive=True)  # without hidden files
    written_here = ('.bin', '.mask', '.tmp', '.part', '.etag', 'meta.json')
    return sorted(path for path in paths if os.path.isfile(path) and not path.endswith(written_here))


def locate_shards(row, folder, shards):
    """Download the first shards of a dataset (0: all), then its validation shard; return the files."""
    numbers = row['shards'][:shards] if shards else row['shards']
    urls = [row['source'] % number for number in numbers]
    if 'val' in row:
        urls.append(row['val'])
    files = {os.path.join(folder, 'download', url.rpartition('/')[2]): url for url in urls}
    missing = [path for path in files if not os.path.exists(path)]
    check_space(folder, len(missing) * row['disk'] * 1e9)
    download(files, check=count_shard_tokens if row['source'].endswith('.bin') else None)
    return list(files)


# -----------------------------------------------------------------------------
# Downloading

def lock_folder(folder):
    """Lock a folder against writers in other processes, until the returned file is closed or this process
    ends."""
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, '.lock'), 'a')
    try:
        if os.name == 'nt':
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, (BlockingIOError, PermissionError)):  # or the file system has no locks
            raise UserError(f'another process is writing to {folder}: wait for it, or use another '
                            'folder') from None
    return file


PAUSES = 0.5, 1, 2, 4, 0  # seconds to wait after each failed attempt


def download(urls, digest=None, check=None):
    """Download {path: url}, except files that exist. Interrupted downloads resume from path.part. A file gets
    its path when its length is right, its sha256 is digest (or the server's) and check accepts it."""
    for path, url in urls.items():
        if os.path.exists(path):
            continue
        print(f'downloading {url}', file=sys.stderr)
        part = path + '.part'
        with lock_folder(os.path.dirname(path)):
            expected = fetch_with_retries(url, part)
            try:
                expected = digest or expected
                if expected and expected != (actual := sha256([part])):
                    raise UserError(f'its sha256 is {actual}, not {expected}')
                if check:
                    check(part)
            except UserError as error:
                os.remove(part)
                raise UserError(f'{url}: the download is corrupt ({error}): try again') from None
            os.replace(part, path)


def fetch_with_retries(url, part):
    for attempt, pause in enumerate(PAUSES, 1):
        try:
            return fetch(url, part)
        except (requests.RequestException, ValueError) as error:  # ValueError: a malformed address or header
            if attempt == len(PAUSES):
                raise UserError(f'{url}: {attempt} attempts failed ({error}): run the same command '
                                'again to resume') from None
            time.sleep(pause)


def fetch(url, part):
    """Try once to complete the file part. Returns the sha256 if Hugging Face sends it."""
    etag_path = part + '.etag'  # the ETag of the version that part belongs to
    headers = {'Accept-Encoding': 'identity'}
    start = 0
    if os.path.exists(part) and os.path.exists(etag_path):
        with open(etag_path, encoding='latin-1') as file:
            etag = file.read()
        if etag.startswith('"'):  # a weak ETag, W/"...", does not identify the bytes
            start = os.path.getsize(part)
            headers |= {'Range': f'bytes={start}-', 'If-Range': etag}
    check_https(url)
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
        hops = [*reply.history, reply]
        for hop in hops:
            check_https(hop.url)
        code = reply.status_code
        content_range = re.fullmatch(rf'bytes {start}-\d+/(\d+)', reply.headers.get('Content-Range', ''))
        length = reply.headers.get('Content-Length', '')
        etag = reply.headers.get('ETag', '')
        if code in (401, 403, 404):
            raise UserError(f'the server answers {code} {reply.reason} for {url}: check the address')
        if start and (code == 416 or code == 206 and not (content_range and etag == headers['If-Range'])):
            os.remove(part)
            raise requests.ConnectionError('the server cannot continue the download')
        if code != 200 and not content_range:
            raise requests.ConnectionError(f'the server answered {code} {reply.reason}')
        if 'text/html' in reply.headers.get('Content-Type', ''):
            raise UserError(f'{url} is a web page: give the address of the file itself')
        total = None
        if code == 206:
            total = int(content_range[1])
        elif length.isdecimal():
            total = int(length)
        elif reply.headers.get('Transfer-Encoding') != 'chunked':  # which marks its own end
            raise UserError(f'{url}: the server does not say how long the file is: download it another way')
        if code == 200:  # the whole file, perhaps a newer version
            start = 0
            with open(etag_path, 'w', encoding='latin-1') as file:
                file.write(etag)
        check_space(os.path.dirname(part), (total or 0) - start)
        progress = Progress(os.path.basename(part), (total or 0) / 1e6, 'MB')
        with open(part, 'ab' if start else 'wb') as file:
            for block in reply.iter_content(1 << 16):
                file.write(block)
                progress(file.tell() / 1e6)
            if total is not None and file.tell() != total:
                raise requests.ConnectionError(f'received {file.tell():,} of {total:,} bytes')
    os.remove(etag_path)
    linked = re.fullmatch('"?([0-9a-f]{64})"?', hops[0].headers.get('X-Linked-ETag', ''))
    return linked[1] if linked else None


def check_https(url):
    if not re.match(r'https://|http://(127\.0\.0\.1|localhost)(:\d+)?/', url):
        raise UserError(f'{url} is not secure: use https')


def check_space(folder, n_bytes):
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(f'{folder} has {free / 1e9:,.1f} GB free but needs {n_bytes / 1e9:,.1f} GB: '
                        'free some disk space')


def sha256(files):
    digest = hashlib.sha256()
    for path in files:
        with open(path, 'rb') as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# Writing bins

def prepare(dataset, source='', tokenizer='', vocab_size=4096, val_fraction=0.0, shards=0):
    """Write the bins and meta.json of a dataset that is in DATASETS or has a source. Returns meta."""
    row = DATASETS.get(dataset, {})
    if row and source not in ('', row['source']):
        raise UserError(f'dataset={dataset!r} has its own source: use another name, --dataset=NAME')
    if not row and not source:
        raise UserError(f'unknown dataset={dataset!r}: choose {", ".join(DATASETS)} or add --source')
    # settings left empty come from the table
    source = source or row['source']
    tokenizer = tokenizer or row.get('tokenizer', 'gpt2')
    val_fraction = val_fraction or row.get('val_fraction', 0.1)
    settings = dict(val_fraction=val_fraction, shards=shards)
    check(settings, 'val_fraction > 0', 'val_fraction < 1', 'shards >= 0')
    if shards and 'shards' not in row:
        raise UserError(f'shards={shards}, but {source} does not come in shards: leave it out')
    if source.endswith('.bin') and tokenizer != 'gpt2':
        raise UserError(f"tokenizer={tokenizer!r}, but {source} holds GPT-2's tokens: leave it out")
    if source.endswith('.parquet'):
        optional('pyarrow.parquet', source)  # before the download, not after

    folder = os.path.join(DATA, dataset)
    lock = lock_folder(folder)
    files = locate_shards(row, folder, shards) if 'shards' in row else locate(source, folder)
    if not any(os.path.getsize(path) for path in files):
        raise UserError(f'source={source!r} is empty: pass a file with text')
    spec = make_spec(tokenizer, files, vocab_size)
    tok = get_tokenizer(spec)
    if tok.n_vocab > 65536:
        raise UserError(f'the tokenizer has {tok.n_vocab:,} tokens: use one with at most 65,536')
    dtype = np.dtype('uint8' if tok.n_vocab <= 256 else '<u2')
    paths = [os.path.join(folder, name)
             for name in ('train.bin', 'val.bin', 'train.mask', 'val.mask', 'meta.json')]
    train_tmp, val_tmp, train_mask_tmp, val_mask_tmp, meta_tmp = [path + '.tmp' for path in paths]
    n_tokens, starts = write_tokens(files, tok, dtype, train_tmp, train_mask_tmp)
    is_chat = os.path.getsize(train_mask_tmp) > 0
    if n_tokens < 2:
        raise UserError(f'source={source!r} has {n_tokens} tokens: give a longer text')
    if 'val' in row:
        n_val = count_shard_tokens(files[-1])
    else:
        n_val = min(max(1, round(n_tokens * val_fraction)), n_tokens - 1)
    if is_chat and not starts:
        raise UserError(f'source={source!r} has one conversation: give two or more')
    n_train = choose_split(n_tokens, n_val, starts, is_chat)
    n_val = n_tokens - n_train
    move_end(train_tmp, val_tmp, n_train * dtype.itemsize)
    move_end(train_mask_tmp, val_mask_tmp, n_train if is_chat else 0)
    meta = dict(tokenizer=spec, vocab_size=tok.n_vocab, dtype=dtype.name, train_tokens=n_train,
                val_tokens=n_val, chat=CHAT_FORM if is_chat else None, source=source,
                source_sha256=sha256(files))
    with open(meta_tmp, 'w', encoding='utf-8') as file:
        json.dump(meta, file)

    # all files are complete: replace the old ones, without ever having new bins beside an old meta.json
    meta_path = paths[-1]
    if os.path.exists(meta_path):
        with open(meta_path, encoding='utf-8', errors='replace') as file:
            if meta['source_sha256'] not in (old := file.read()) or json.dumps(spec) not in old:
                print(f'replacing the dataset in {folder}, which had another text or tokenizer')
        os.remove(meta_path)
    for path in paths:
        os.replace(path + '.tmp', path)
        if path.endswith('.mask') and not is_chat:
            os.remove(path)
    conversations = f'{len(starts) + 1:,} conversations, ' if is_chat else ''
    print(f'{folder}: {conversations}{n_train:,} tokens for training, {n_val:,} for validation, '
          f'vocabulary {tok.n_vocab:,} ({spec["type"]}), {dtype.name}')
    lock.close()
    return meta


def make_spec(tokenizer, files, vocab_size):
    """The spec of a tokenizer. char and bpe are made from the text in files."""
    if tokenizer == 'char':
        seen = np.zeros(sys.maxunicode + 1, bool)
        for text, _, mark in read(files, 'characters'):
            seen[code_points(text)] = True
            if mark == ANSWER:
                seen[ord(END_CHARACTER)] = True
        return dict(type='char', chars=''.join(map(chr, np.flatnonzero(seen))))
    if tokenizer == 'bpe':
        import regex  # installed with tiktoken
        check(dict(vocab_size=vocab_size), 'vocab_size > 257')  # 256 bytes and the end of text
        words = Counter()
        n_chars = 0
        for text, *_ in read(files, 'words'):
            words.update(regex.findall(SPLIT, text))
            n_chars += len(text)
            if n_chars > 100e6:  # more text would cost memory and hardly change the merges
                break
        return dict(type='bpe', split=SPLIT, merges=train_bpe(words, vocab_size - 257))
    if re.fullmatch('gpt2(-medium|-large|-xl)?', tokenizer):
        return dict(type='gpt2')
    if tokenizer.endswith('.json') and os.path.exists(tokenizer):
        return read_json(tokenizer).get('tokenizer') or {}
    dataset = tokenizer.removesuffix('meta.pkl')
    for folder in (dataset, os.path.join(DATA, dataset)):
        spec = read_json(os.path.join(folder, 'meta.json')).get('tokenizer') or nanogpt_tokenizer(folder)
        if spec:
            return spec
    if not os.path.exists(tokenizer):
        raise UserError(f'tokenizer={tokenizer!r} is not char, bpe, gpt2, a dataset, a run or a checkpoint: '
                        'check the name')
    from model import load_checkpoint  # only here, as it takes seconds to import
    return load_checkpoint(tokenizer)['tokenizer']


def write_tokens(files, tok, dtype, path, mask_path):
    """Write the ids of all files, and of conversations the mask. Returns the number of tokens and where
    documents start."""
    starts = array('q')  # of all documents but the first
    n_tokens = 0
    with open(path, 'wb') as file, open(mask_path, 'wb') as mask_file:
        for ids, starts_document, mark in encode_files(files, tok):
            if starts_document:
                starts.append(n_tokens)
            ids.astype(dtype, copy=False).tofile(file)
            if mark is not None:
                mask = np.full(len(ids), mark, np.uint8)
                if starts_document or n_tokens == 0:
                    mask[0] = DOCUMENT_START
                mask.tofile(mask_file)
            n_tokens += len(ids)
    return n_tokens, starts


def encode_files(files, tok):
    """Yield (ids, starts_document, mark), with tok.eot between documents or after each answer. Empty
    documents are skipped."""
    eot = np.array([] if tok.eot is None else [tok.eot], np.uint16)
    document_ended = False
    any_tokens = False
    for ids, ends_document, mark in encode_pieces(read(files, 'tokens'), tok):
        starts_document = document_ended and len(ids) > 0
        if starts_document:
            if mark is None:
                yield eot, False, None
            document_ended = False
        if mark == ANSWER:
            if tok.eot is None:
                raise UserError('this tokenizer has no token to end an answer: use char, bpe or gpt2')
            ids = np.append(ids, eot)
        yield ids, starts_document, mark
        any_tokens = any_tokens or len(ids) > 0
        document_ended = document_ended or ends_document and any_tokens


def encode_pieces(pieces, tok):
    """Replace the text of each piece by its ids. tiktoken releases the GIL, so threads use all cores."""
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(pieces, 64)):
            texts, *rest = zip(*batch, strict=True)
            if isinstance(texts[0], str):  # shards hold ids already
                texts = pool.map(tok.encode, texts)
            yield from zip(texts, *rest, strict=True)


def move_end(path, new_path, n_bytes):
    """Move all but the first n_bytes of a file to a new file."""
    with open(path, 'r+b') as file, open(new_path, 'wb') as new_file:
        file.seek(n_bytes)
        shutil.copyfileobj(file, new_file)
        file.truncate(n_bytes)


def choose_split(n_tokens, n_val, starts, is_chat):
    """How many tokens to train on: all but the last n_val, or up to the nearest document. Text is cut in a
    document if that is more than n_val / 2 away."""
    target = n_tokens - n_val
    nearest = min(starts, key=lambda start: abs(start - target), default=target)
    return nearest if is_chat or abs(nearest - target) <= n_val / 2 else target


# -----------------------------------------------------------------------------
# Loading bins

def load_dataset(dataset):
    """Return meta and {'train': path, 'val': path} of a dataset that prepare.py or nanoGPT wrote. Checks the
    sizes of the bins, but not their ids: prepare does that."""
    folder = os.path.join(DATA, dataset)
    path = os.path.join(folder, 'meta.json')
    bins = {}
    sizes = {}
    for split in ('train', 'val'):
        bins[split] = os.path.join(folder, f'{split}.bin')
        sizes[split] = os.path.getsize(bins[split]) if os.path.exists(bins[split]) else 0
    advice = f'run python prepare.py --dataset={dataset}'
    if dataset not in DATASETS:
        advice += ' --source=FILE_OR_FOLDER_OR_URL'
    if os.path.exists(path):
        meta = read_json(path)
    elif all(sizes.values()) and not os.path.exists(path + '.tmp'):
        spec = nanogpt_tokenizer(folder) or dict(type='gpt2')
        n_vocab = len(spec['chars']) if spec['type'] == 'char' else GPT2_VOCAB
        meta = dict(tokenizer=spec, vocab_size=n_vocab, dtype='uint16',
                    train_tokens=sizes['train'] // 2, val_tokens=sizes['val'] // 2)
    else:
        raise UserError(f'{folder} is not prepared (no meta.json): {advice}')
    try:
        width = dict(uint8=1, uint16=2)[meta['dtype']]
        counts = meta['vocab_size'], meta['train_tokens'], meta['val_tokens']
        if not all(isinstance(n, int) and n > 0 for n in counts):
            raise ValueError('a count is not a positive integer')
        if meta['tokenizer']['type'] in ('char', 'bpe'):  # gpt2 may need a download
            if get_tokenizer(meta['tokenizer']).n_vocab != meta['vocab_size']:
                raise ValueError('vocab_size does not match the tokenizer')
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged ({type(error).__name__}: {error}): {advice}') from None
    for split, bin in bins.items():
        expected = {bin: meta[f'{split}_tokens'] * width}
        if meta.get('chat'):
            expected[os.path.join(folder, f'{split}.mask')] = meta[f'{split}_tokens']
        for file, n_bytes in expected.items():
            size = os.path.getsize(file) if os.path.exists(file) else 0
            if size != n_bytes:
                raise UserError(f'{file} holds {size:,} bytes but meta.json says {n_bytes:,}: {advice}, or '
                                'delete meta.json if nanoGPT wrote the bins')
    return meta, bins


def read_json(path):
    """The object in a JSON file, or {} if the file does not exist."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({error}): replace it') from None
    if not isinstance(content, dict):
        raise UserError(f'{path} is damaged (not a JSON object): replace it')
    return content


class PlainUnpickler(pickle._Unpickler):  # the C version may allocate gigabytes for a damaged file
    """Loads dicts, lists, strings and numbers. A pickle that refers to nothing else cannot run code."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it refers to {module}.{name}')


def nanogpt_tokenizer(folder):
    """The spec of the char tokenizer in nanoGPT's meta.pkl, or None if the file does not exist."""
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        return None
    try:
        with open(path, 'rb') as file:
            content = file.read(1 << 24)
        itos = PlainUnpickler(io.BytesIO(content)).load()['itos']
        chars = [itos[i] for i in range(len(itos))]
        if not len(set(chars)) == len(chars) > 0 or any(len(char) != 1 for char in chars):
            raise ValueError('itos does not map ids to different characters')
        chars = ''.join(chars)
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f'{path} is damaged or not from nanoGPT ({error!r}): replace it') from None
    return dict(type='char', chars=chars)


if __name__ == '__main__':
    configure(globals())
    meta = prepare(dataset, source, tokenizer, vocab_size, val_fraction, shards)
    if dataset not in DATASETS and tokenizer in ('', 'char', 'gpt2', 'bpe'):
        name = os.path.basename(dataset.rstrip('/'))
        finetune = meta['chat'] and meta['tokenizer']['type'] == 'gpt2'
        config = 'config/finetune_qa.py' if finetune else 'config/train_shakespeare.py'
        arguments = shlex.join([config, f'--dataset={dataset}', f'--out_dir=out-{name}'])
        print(f'Train on it with\npython train.py {arguments}')
