"""
Settings are a script's own globals, one line each: name = default  # what it sets.
The command line overrides them, from left to right:

$ python train.py config/train_shakespeare.py --batch_size=32

A path names an override file: ordinary Python that sees the current values.
--name=value sets one setting; the type follows the default. --help lists all.
"""
import contextlib
import difflib
import importlib
import os
import re
import runpy
import sys
import textwrap
from pathlib import Path

BOOLEANS = {'True': True, 'true': True, '1': True, 'False': False, 'false': False, '0': False}
TYPE_NAMES = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text in quotes'}


class UserError(Exception):
    """A mistake that the user can fix. The message, one line on stderr, says what is wrong, with the value,
    and what to do. The exit code is 2."""

    def __str__(self):
        return one_line(super().__str__())


def one_line(text):
    """The text on one line, with ? for characters that a terminal would obey, such as ESC."""
    return ''.join(c if c.isprintable() else '?' for c in ' '.join(str(text).split()))


def printable(text):
    """The text for stdout: a terminal shows ? for characters that it would obey, such as ESC."""
    return re.sub(r'[\0-\x08\x0b-\x1f\x7f-\x9f]', '?', text) if sys.stdout.isatty() else text


def configure(namespace, argv=None):
    """Apply the command line (or argv) to the settings in a script's globals(), and return them as a dict.

    Settings are the lower-case names that hold a bool, int, float or str when this is called."""
    settings = {name: value for name, value in namespace.items()
                if re.fullmatch('[a-z][a-z0-9_]*', name) and isinstance(value, (bool, int, float, str))}
    defaults = dict(settings)
    sys.excepthook = _report_error

    def override(name, value, source):
        if name not in settings:
            nearest = difflib.get_close_matches(name, settings, 1, cutoff=0.5)
            hint = f'did you mean {nearest[0]}?' if nearest else '--help lists them all'
            raise UserError(f'{source}: unknown setting {name!r}: {hint}')
        settings[name] = _convert(name, value, defaults[name], source)

    for arg in sys.argv[1:] if argv is None else argv:
        name, equals, value = arg.removeprefix('--').partition('=')
        if arg in ('--help', '-h'):
            _print_help(namespace, defaults)
            sys.exit(0)
        elif not arg.startswith('--'):
            for name, value in _run_file(arg, settings).items():
                override(name, value, arg)
        elif equals:
            override(name, value, arg)
        else:
            raise UserError(f'{arg}: write --{name}=VALUE, without spaces')
    namespace.update(settings)
    return settings


def _convert(name, value, default, source):
    """Convert a value, text from the command line or any object from a file, to the default's type."""
    kind = type(default)
    try:
        if kind is bool or default == 'auto' and str(value) in BOOLEANS:
            return BOOLEANS[str(value)]
        if isinstance(value, bool) or kind is str and not isinstance(value, str):
            raise TypeError
        if kind is int and not re.fullmatch(r'\s*[-+]?\d+\s*', str(value)):
            value = float(value)  # 1e3 is a whole number, 1.5 is not
            if value != int(value):
                raise ValueError
        return kind(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f'{source}: {name} takes {TYPE_NAMES[kind]}, such as {default!r}, '
                        f'not {value!r}') from None


def _run_file(path, settings):
    """Run an override file and return the settings that it defines. Modules, functions and _names
    in it are private."""
    if not os.path.isfile(path) or not path.endswith('.py'):
        nearest = difflib.get_close_matches(path, map(str, Path(path).parent.glob('*.py')), 1)
        hint = f'did you mean {nearest[0]}?' if nearest else 'write a setting as --name=value'
        raise UserError(f'there is no override file {path!r}: {hint}')
    scope = runpy.run_path(path, settings)
    return {name: value for name, value in scope.items() if name in settings
            or not (name.startswith('_') or callable(value) or isinstance(value, type(sys)))}


def _print_help(namespace, defaults):
    """Print the docstring, then the settings as the source has them: headings, defaults, comments."""
    print((namespace.get('__doc__') or '').strip() + '\n\nsettings:')
    with open(namespace['__file__'], encoding='utf-8') as f:
        lines = f.read().splitlines()
    remaining = dict(defaults)
    for previous, line in zip(['', *lines], lines, strict=False):
        setting = re.match(r' *(\w+)(?:: \w+)? = [^#]*(?:# *(.*))?', line)
        if not setting or setting[1] not in remaining:
            continue
        if previous.startswith('# '):
            print(f'\n{previous}')
        name = f'  --{setting[1]}={remaining.pop(setting[1])!r}'
        comment = textwrap.wrap(setting[2] or '', 47)
        print(f'{name:<32} ' + ('\n' + ' ' * 33).join(comment))
    for name, value in remaining.items():  # bench.py takes the model's from model.py
        print(f'  --{name}={value!r}')


def check(settings, *rules):
    """Refuse settings that break a rule, such as 'batch_size > 0'."""
    for rule in rules:
        if not eval(rule, {}, settings):
            name = rule.split()[0]
            raise UserError(f'{name}={settings[name]!r} must be{rule.removeprefix(name)}')


def optional(module, needed_for):
    """Import a package that is not among the requirements."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split('.')[0]
        raise UserError(f'{needed_for} needs one more package: pip install {package}') from None


@contextlib.contextmanager
def writing(path):
    """A new file that gets its name when it is complete, so that path is always whole, old or new."""
    tmp = Path(f'{path}.tmp')
    try:
        tmp.unlink(missing_ok=True)  # it may be a link
        with open(tmp, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        tmp.unlink(missing_ok=True)
        raise OSError(f'cannot write {path}: {one_line(error)[:80]}') from None


def _report_error(kind, error, trace):
    """The scripts' sys.excepthook: one line where the user can act on it, a traceback otherwise."""
    text = one_line(error)
    rank = os.environ.get('RANK')
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    if issubclass(kind, MemoryError) or re.search('out of memory|allocate memory', text):
        text = f'out of memory ({text[:100]}): use a smaller batch_size, block_size or model'
    elif rank and (kind.__name__.startswith('Dist') or re.search('gloo|NCCL', text)):
        text = f'rank {rank} lost another rank: see its error, or set GLOO_SOCKET_IFNAME ({text[:200]})'
    elif not issubclass(kind, (UserError, OSError)):  # an OSError names its file: permission, disk full, ...
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {text}', file=sys.__stderr__)  # torch.distributed replaces sys.stderr for a while
    sys.exit(2)


def resolve_device(device):
    """The device to use, for 'auto' the best one: cuda, then mps, then cpu. Sets it up."""
    import torch
    counts = dict(cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available()), cpu=1)
    if device == 'auto':
        device = next(kind for kind, count in counts.items() if count)
    if device == 'cuda':
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    kind, _, index = str(device).partition(':')
    if int(index or 0) >= counts.get(kind, 0):
        available = ', '.join(f'{count} {kind}' for kind, count in counts.items())
        raise UserError(f"device={device!r}, but this machine has {available}: use 'auto'")
    if kind == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for what stays in float32
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if kind == 'cpu' and processes > 1:  # torchrun sets one thread for each process
        torch.set_num_threads(max(1, os.cpu_count() // processes))
    return device


def resolve_dtype(dtype, device):
    """The dtype to compute in. 'auto' is float32 on a CPU, as bfloat16 is slower on many."""
    import torch
    if dtype == 'auto':
        dtype = 'float32'
        if device.startswith('cuda'):  # a T4 emulates bfloat16, which is slow
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = 'bfloat16' if native else 'float16'
    check(dict(dtype=dtype), "dtype in ('float32', 'bfloat16', 'float16')")
    if dtype == 'float16' and not device.startswith('cuda'):
        raise UserError(f"dtype='float16' needs CUDA, not {device}: use 'bfloat16' or 'float32'")
    return dtype
