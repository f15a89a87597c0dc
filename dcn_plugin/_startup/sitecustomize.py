"""What a program started by `python -m dcn_plugin` does before its first line, and the processes that it starts.

Python imports a module `sitecustomize` of `PYTHONPATH` before it looks at the program. `python -m dcn_plugin` puts this
folder there, so the program is run by Python itself, not by an imitation of it. Other interpreters may come by here,
older ones and such without torch: they are let pass.
"""

import importlib
import json
import os
import signal
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

FOLDER = os.path.dirname(os.path.abspath(__file__))
VARIABLE = "DCN_PLUGIN_RUN"

# Processes of the standard library and of torch that run no program.
HELPERS = ("from multiprocessing.resource_tracker", os.path.join("torch", "_inductor", "compile_worker"))


def hand_on():
    """Leave `sys.path`, and let the `sitecustomize` run that Python would have found."""
    while FOLDER in sys.path:
        sys.path.remove(FOLDER)
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


def is_program():
    """Tell programs from helpers, and from tools of the environment that a program calls (pip, ninja, ...)."""
    helper = any(name in word for word in sys.orig_argv for name in HELPERS)
    return not helper and os.path.dirname(sys.argv[0]) != os.path.dirname(sys.executable)


def first_on_path():
    """Return what Python will put first on `sys.path`: what the program imports from there, the plug does too."""
    program = sys.argv[0]
    if program in ("-c", "-", ""):
        return ""
    if program == "-m":
        return os.getcwd()
    from zipfile import is_zipfile

    whole = os.path.isdir(program) or is_zipfile(program)
    return program if whole else os.path.dirname(os.path.realpath(program))


def plug_in(run):
    """Import the plug, put the integrations in place, and say what they replaced."""
    if not any(word.startswith("from multiprocessing.") for word in sys.orig_argv):  # those have their parent's
        run["path"] = first_on_path()
    first = [] if getattr(sys.flags, "safe_path", False) else [run["path"]]
    package = os.path.dirname(os.path.dirname(FOLDER))
    last = [] if package in sys.path else [package]  # the program itself need not find dcn_plugin
    sys.path[:] = first + sys.path + last
    try:
        importlib.import_module("dcn_plugin")
        integrations = importlib.import_module("dcn_plugin.integrations")
        for name in run["accelerate"]:
            said = integrations.enable(name)
            if not run["quiet"]:
                print("dcn_plugin: " + name + ": " + said, file=sys.stderr, flush=True)
    finally:
        for entry in first + last:
            sys.path.remove(entry)


def start():
    try:
        run = json.loads(os.environ[VARIABLE])
        if run["prefix"] != sys.prefix or not (run["first"] or is_program()):
            return
        plug_in(run)
    except KeyboardInterrupt:  # end as a program does that is interrupted
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception as error:  # Python would go on without the plug
        if sys.flags.verbose:
            raise
        message = "dcn_plugin: nothing is run: " + type(error).__name__ + ": " + str(error)
        print(message, file=sys.stderr, flush=True)
        os._exit(1)
    run.update(first=False, quiet=True)
    os.environ[VARIABLE] = json.dumps(run)


if __name__ == "sitecustomize":
    try:
        hand_on()
    finally:
        if VARIABLE in os.environ:
            start()
