"""
Settings are a script's own globals, one line each: name = default  # why. They are overridden, in order, by

$ python train.py config/train_shakespeare.py --batch_size=32

a path: an override file, ordinary Python that sees the current values, may compute and may import,
--name=value: one setting, converted to the type of its default. --help lists them all.

Whatever a user can mend is raised as UserError and ends the script with one line on stderr and exit code 2.
"""
import ctypes
import difflib
import glob
import importlib
import os
import platform
import re
import sys
import traceback

TRUTH = {'True': True, 'true': True, '1': True, 'False': False, 'false': False, '0': False}


class UserError(Exception):
    """A mistake that the user can mend: the message names the setting or file, both values, and the remedy."""

    def __str__(self):
        return ' '.join(super().__str__().split())  # one line, whatever it quotes


def _one_line(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    lost = kind.__name__.startswith('Dist') or kind is RuntimeError and re.search('gloo|NCCL', str(error))
    if 'RANK' in os.environ and lost:
        kind, error = UserError, (f"process {os.environ['RANK']} has lost another one, which may have said why "
                                  f'({str(error).splitlines()[0]})')
    if not issubclass(kind, (UserError, OSError)):  # an OSError names its file: permission, disk full, ...
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {error}', file=sys.__stderr__)  # the real one: torch.distributed puts its own in place for a while
    sys.exit(2)


def configure(namespace, argv=None):
    """Apply the command line (or argv) to the settings in namespace, a script's globals(); return them as a dict.

    Settings are the lower-case names that hold a bool, int, float or str at the time of the call."""
    sys.excepthook = _one_line  # from here on a UserError ends the script in one line
    settings = {k: v for k, v in namespace.items()
                if re.fullmatch('[a-z][a-z0-9_]*', k) and isinstance(v, (bool, int, float, str))}
    defaults = dict(settings)

    for arg in sys.argv[1:] if argv is None else argv:
        option, equals, text = arg.removeprefix('--').partition('=')
        if arg in ('--help', '-h'):
            _print_help(namespace, defaults)
            sys.exit(0)
        is_setting = arg.startswith('--') or equals and not os.path.exists(arg)
        for name, value in ({option: text} if is_setting else _run_file(arg, settings)).items():
            if name not in settings:
                near = difflib.get_close_matches(name.replace('-', '_'), settings, 1, 0.5)
                hint = f'did you mean {near[0]}?' if near else "--help lists them; a file's own names begin with _"
                raise UserError(f'{arg}: unknown setting {name!r}: {hint}')
            if is_setting and not (equals and arg.startswith('--')):
                example = not defaults[name] if isinstance(defaults[name], bool) else settings[name]
                raise UserError(f'{arg}: write --{name}={value or example}, with no space')
            settings[name] = _typed(name, value, defaults[name], arg)
    namespace.update(settings)
    return settings


def _typed(name, value, default, where):
    """value, the text of an argument or an object from a file, as the type of default."""
    kind, found = type(default), value
    try:
        if kind is bool or default == 'auto' and str(value) in TRUTH:  # a bool settles 'auto' too
            return TRUTH[str(value)]
        if isinstance(value, bool) or kind is str and not isinstance(value, str):
            raise TypeError
        if kind is int:
            value = int(value) if re.fullmatch(r'\s*[-+]?\d+\s*', str(value)) else float(value)
            if value != int(value):  # 1e3 is a whole number, 1.5 is not
                raise ValueError
        return kind(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        wanted = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text in quotes'}[kind]
        raise UserError(f'{where}: {name} takes {wanted}, such as {default!r}, not {found!r}') from None


def _run_file(path, settings):
    """Run an override file and return what it defined; modules, functions and _names are its own business."""
    if not os.path.isfile(path):
        beside = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), '*.py'))
        near = difflib.get_close_matches(path, beside, 1, 0.8)
        hint = f'did you mean {near[0]}?' if near else 'a setting is written --name=value'
        raise UserError(f'there is no override file {path!r}: {hint}')
    scope = dict(settings, __file__=path, __name__='config')
    try:
        with open(path, encoding='utf-8-sig') as f:
            exec(compile(f.read(), path, 'exec'), scope)
    except (Exception, SystemExit) as error:
        lines = [1, *(frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path)]
        line = getattr(error, 'lineno', None) or lines[-1]
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {error}') from error
    return {k: v for k, v in scope.items()
            if k in settings or not (k.startswith('_') or callable(v) or isinstance(v, type(sys)))}


def _print_help(namespace, defaults):
    """The script's docstring, then its settings as they stand in its source: name, default, comment."""
    with open(namespace['__file__'], encoding='utf-8') as f:
        source = f.read()
    print((namespace.get('__doc__') or '').strip() + '\n\nsettings:')
    for name, default in defaults.items():
        comment = re.search(rf'^ *{name}(?:: \w+)? = .*?\s# ?(.*)$', source, re.MULTILINE)
        print(f'  --{name}={default!r}'.ljust(42), comment[1] if comment else '')


def check(settings, *rules):
    """Each rule, such as 'batch_size > 0', has to hold."""
    for rule in rules:
        if not eval(rule, {}, settings):
            name = rule.split()[0]
            raise UserError(f'{name}={settings[name]!r}: it has to be{rule.removeprefix(name)}')


def optional(module, wanted_for):
    """Import a package that is not among the requirements."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{wanted_for} needs one more package: pip install {module.split('.')[0]}") from None


def keep_memory():
    """Have the C library keep what tensors on the CPU have freed, for the next ones. By default it hands large blocks
    back to the system, which clears them page by page when they are asked for again: a third of a step of GPT-2."""
    if platform.libc_ver()[0] == 'glibc':
        mallopt, m_trim_threshold, m_mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # as in malloc.h
        mallopt(m_trim_threshold, -1)
        mallopt(m_mmap_max, 0)


def resolve(device, dtype, compile=False, width=0):
    """Settle what depends on the machine: returns (device, dtype, compile), each as asked for or, where 'auto', chosen.

    device: cuda, then mps, then cpu. dtype: bfloat16 where a GPU has it natively, or where a CPU has and the model is
    so wide that it is faster, float16 on older CUDA cards, float32 elsewhere. compile: on CUDA."""
    import torch
    present = {'cuda': torch.cuda.device_count() if torch.cuda.is_available() else 0,
               'mps': int(torch.backends.mps.is_available()), 'cpu': 1}
    if device == 'auto':
        device = next(kind for kind in present if present[kind])
    if device == 'cuda':  # a card of its own for every process that torchrun starts
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    match = re.fullmatch(r'(cuda|mps|cpu)(?::(\d+))?', str(device))
    if not match or int(match[2] or 0) >= present[match[1]]:
        there = ', '.join(f'{count} {kind}' for kind, count in present.items())
        raise UserError(f"device={device!r}, but this machine has {there}: choose one of these or leave it at 'auto'")
    kind = match[1]
    if kind == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for what stays float32
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if kind == 'cpu' and processes > 1:  # to each of which torchrun gives one thread
        torch.set_num_threads(max(1, os.cpu_count() // processes))
    if dtype == 'auto' and kind == 'cuda':  # a T4 claims bfloat16 but only emulates it, hence the argument
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    if dtype == 'auto':
        fast = kind == 'cpu' and width >= 256 and torch.cpu._is_avx512_bf16_supported()
        dtype = 'bfloat16' if fast else 'float32'
    check(dict(dtype=dtype, compile=compile), "dtype in ('float32', 'bfloat16', 'float16')",
          "compile in (True, False, 'auto')")
    if dtype == 'float16' and kind != 'cuda':
        raise UserError(f"dtype='float16' trains only on CUDA, not on {kind}: use 'bfloat16' or 'float32'")
    return device, dtype, kind == 'cuda' if compile == 'auto' else compile
