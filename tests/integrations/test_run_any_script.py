"""`python -m dcn_plugin PROGRAM` is `python PROGRAM` with the plug in."""

import json
import os
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from run_python import OF_TORCHAO

import dcn_plugin
from dcn_plugin import __main__ as command
from dcn_plugin import integrations
from dcn_plugin._startup import sitecustomize

pytest.importorskip("timm")
pytest.importorskip("torchvision")

PLUG = ("-m", "dcn_plugin")

# What a program can see of how it was started; it does not import torch, so it says the same with and without the plug.
LOOK = """
import os, pickle, signal, sys
class Own:
    pass
main = sys.modules["__main__"]
print(sys.argv, sys.path, sys.orig_argv[1:], __name__, __package__, globals().get("__file__"))
print(vars(main) is globals(), sorted(globals()), __spec__ and __spec__.name)
print(type(pickle.loads(pickle.dumps(Own()))) is Own, repr(sys.stdin.read()))
print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.flags, sys.warnoptions)
print("site", sys.of_the_site, flush=True)
"""
# Each form of a program, and an end that a program may have.
PROGRAMS = {
    "script": ("look.py", "sys.exit(7)\n"),
    "module": ("look_in/module.py", "def fail():\n    raise ValueError('of the program')\nfail()\n"),
    "package": ("look_in/__main__.py", "sys.exit('in words')\n"),
    "zip": ("look.zip", "os.kill(os.getpid(), signal.SIGTERM)\n"),
    "stdin": (
        "look_stdin.py",
        "try:\n    signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt:\n    sys.exit(130)\n",
    ),
}
ENDS = {"script": 7, "module": 1, "package": 1, "zip": -signal.SIGTERM, "stdin": 130}


def python(*arguments, folder, path=(), **options):
    given = os.environ.get("PYTHONPATH")
    entries = [*path, Path(dcn_plugin.__file__).parents[1], *([given] if given else [])]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, entries)), OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, preexec_fn=with_sigint, **options
    )


def with_sigint():
    """As in a terminal: what a shell starts in the background ignores SIGINT, and so does what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("form", PROGRAMS)
def test_a_program_is_run_as_python_runs_it(tmp_path, form):
    name, end = PROGRAMS[form]
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if form == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("__main__.py", LOOK + end)
    else:
        file.write_text(LOOK + end)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.of_the_site = __file__\n")
    call = {"module": ["-m", "look_in.module"], "package": ["-m", "look_in"], "stdin": ["-"]}.get(form, [name])
    options = dict(folder=tmp_path, path=["", tmp_path / "site"], input=LOOK + end if form == "stdin" else "words")
    plain = python("-u", *call, "--argument", "two words", **options)
    plugged = python("-u", *PLUG, *call, "--argument", "two words", **options)
    assert plain.returncode == ENDS[form] and "sitecustomize.py" in plain.stdout
    assert (plugged.returncode, plugged.stdout, plugged.stderr) == (plain.returncode, plain.stdout, plain.stderr)


# As timm's validate.py and train.py do: arguments, a model by its name, workers; and what else starts processes.
PROGRAM = """
import argparse, subprocess, sys
import torch

def served():  # by what this process was given, not by an import of its own
    return sys.modules["dcn_plugin.integrations.torchvision"].installed()

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        assert served(), sys.argv
        return torch.rand(3, 32, 32)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--start", nargs="*", default=[])
    args = parser.parse_args()
    import timm
    assert served()
    model = timm.create_model(args.model, num_classes=3).eval()
    for way in args.start:
        if way == "again":  # as Lightning starts its other ranks
            subprocess.run([sys.executable, sys.argv[0], "--model", args.model], check=True)
        elif way == "without":
            code = "import sys; assert 'torch' not in sys.modules and not any('_startup' in p for p in sys.path)"
            subprocess.run([sys._base_executable, "-c", code], check=True)
        else:
            (batch,) = torch.utils.data.DataLoader(Images(), 2, num_workers=1, multiprocessing_context=way)
            print(way, tuple(model(batch).shape))
    print("done", args.start)

if __name__ == "__main__":
    main()
"""


def test_processes_that_a_program_starts_have_the_plug_too(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    plug, start = [*PLUG, "--accelerate", "torchvision"], ["--start", "spawn", "again", "without"]
    done = python(*plug, "program.py", "--model", "resnet18_dcn", *start, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if OF_TORCHAO not in line]
    assert len(said) == 1 and said[0].startswith("dcn_plugin: torchvision: "), "said once, by the first process"
    assert done.stdout.splitlines() == ["spawn (2, 3)", "done []", "done ['spawn', 'again', 'without']"]


RANK = """
import os, sys, timm, torch
assert timm.is_model("resnet18_dcn")
torch.distributed.init_process_group("gloo")
ranks = torch.tensor([1 << torch.distributed.get_rank()])
torch.distributed.all_reduce(ranks)
print("rank", os.environ["RANK"], ranks.item(), sys.argv[1:])
torch.distributed.destroy_process_group()
sys.exit(3 if sys.argv[1:] == ["fail"] else 0)
"""


def test_under_torchrun(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(*launch, *PLUG, "rank.py", "a", folder=tmp_path)
    assert done.returncode == 0 and sorted(done.stdout.split("rank ")[1:]) == ["0 3 ['a']\n", "1 3 ['a']\n"], (
        done.stderr
    )


def test_torchrun_as_the_program(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = python(*PLUG, *launch, "rank.py", "fail", folder=tmp_path)
    assert done.returncode == 1 and done.stdout == "rank 0 1 ['fail']\n" and "exitcode  : 3" in done.stderr, done.stderr


def call(monkeypatch, *arguments, before=()):
    """Run the command in this process; return the command and environment that it would become."""
    became = []
    monkeypatch.setattr(os, "execve", lambda *what: became.append(what))
    monkeypatch.setattr(sys, "argv", ["dcn_plugin/__main__.py", *arguments])
    monkeypatch.setattr(sys, "orig_argv", ["python", *(before or PLUG), *arguments])
    command.main()
    return became[0][1:] if became else None


REFUSED = {
    (): (2, "expected SCRIPT, -m MODULE, -c CODE or -, got none of them"),
    ("-m",): (2, "expected SCRIPT, -m MODULE, -c CODE or -, got -m"),
    ("nowhere.py",): (2, "expected a script, folder or zip file, got 'nowhere.py', which does not exist"),
    ("-u", "a.py"): (2, "expected SCRIPT, -m MODULE, -c CODE or -, got '-u'"),
    ("-m", "nowhere.at_all"): (1, "-m: expected a module, got 'nowhere.at_all'"),
    ("--accelerat", "mmcv", "a.py"): (2, "unrecognized arguments: --accelerat"),
    ("--accelerate", "torchvison", "a.py"): (2, "unknown integration 'torchvison' (did you mean 'torchvision'?)"),
    ("--accelerate", "lacks", "a.py"): (2, "--accelerate: lacks: expected a_package to be installed, got none"),
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_cannot_be_run_is_one_line(monkeypatch, capsys, arguments):
    lacks = integrations.Integration("lacks", "install", "a_package", "nothing")
    monkeypatch.setitem(integrations.INTEGRATIONS, "lacks", lacks)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *arguments)
    printed = capsys.readouterr()
    status, words = REFUSED[arguments]
    assert stopped.value.code == status and printed.out == ""
    assert printed.err.startswith("dcn_plugin: ") and printed.err.count("\n") == 1 and words in printed.err


def test_what_stands_between_or_hides_the_plug_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "-c", "pass", before=["-m", "pdb", "-m", "other"])
    assert "expected to be started by `python -m dcn_plugin`, got 'other'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "flags", types.SimpleNamespace(ignore_environment=1, no_site=0))
    with pytest.raises(SystemExit):
        call(monkeypatch, "-c", "pass")
    assert "got one of the options -E, -I and -S" in capsys.readouterr().err


@pytest.mark.parametrize(
    "before, options",
    [
        (["-m", "dcn_plugin"], []),
        (["-mdcn_plugin"], []),
        (["-um", "dcn_plugin"], ["-u"]),
        (["-W", "error", "-OBmdcn_plugin"], ["-W", "error", "-OB"]),
    ],
)
def test_options_of_python_stay(monkeypatch, before, options):
    command, _ = call(monkeypatch, "-m", "json.tool", "-m", "dcn_plugin", before=before)
    assert command == [sys.executable, *options, "-m", "json.tool", "-m", "dcn_plugin"]


@pytest.mark.parametrize("entries", [None, [], ["a folder"], ["", "a folder"], ["a folder", "", ""], ["", ""]], ids=str)
def test_every_entry_of_pythonpath_stays(monkeypatch, entries):
    """An empty entry is the current folder."""
    if entries is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entries))
    first = call(monkeypatch, "-c", "pass")[1]["PYTHONPATH"]
    assert first.split(os.pathsep) == [sitecustomize.FOLDER, *(entries or [])]
    monkeypatch.setenv("PYTHONPATH", first)
    assert call(monkeypatch, "-c", "pass")[1]["PYTHONPATH"] == first, "a run within a run"


@pytest.mark.parametrize("broken", ["", "{", "[]", "{}"])
def test_nothing_is_run_without_knowing_what_to_put_in_place(tmp_path, monkeypatch, broken):
    monkeypatch.setenv(sitecustomize.VARIABLE, broken)
    done = python("-c", "print('run')", folder=tmp_path, path=[sitecustomize.FOLDER])
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("dcn_plugin: nothing is run: ") and done.stderr.count("\n") == 1


def test_integrations_are_handed_on(monkeypatch):
    _, environment = call(monkeypatch, "--quiet", "--accelerate", "torchvision,torchvision", "-c", "pass")
    run = json.loads(environment[sitecustomize.VARIABLE])
    assert run == dict(accelerate=["torchvision"], quiet=True, prefix=sys.prefix, first=True)


def test_of_several_ranks_one_speaks(monkeypatch):
    for rank, quiet in {"0": False, "1": True}.items():
        monkeypatch.setenv("RANK", rank)
        _, environment = call(monkeypatch, "-c", "pass")
        assert json.loads(environment[sitecustomize.VARIABLE])["quiet"] is quiet


def test_list_says_what_there_is(monkeypatch, capsys):
    lacks = integrations.Integration("lacks", "install", "a_package", "nothing")
    monkeypatch.setitem(integrations.INTEGRATIONS, "lacks", lacks)
    assert call(monkeypatch, "--list") is None
    printed = capsys.readouterr().out
    assert "torchvision  available: " in printed and "lacks        needs a_package: nothing\n" in printed
