"""The command line as people use it: the real program, in a process, on a running system."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from server.embedded import Stack


def fewstep(*arguments: str, url: str = "http://127.0.0.1:9") -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "server.cli", *arguments)
    env = {"FEWSTEP_URL": url, "PATH": "", "COLUMNS": "200", "HOME": "/nonexistent"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_generate_writes_the_picture_and_says_who_made_it(stack: Stack, tmp_path: Path) -> None:
    done = fewstep("generate", "a red circle", "-o", str(tmp_path / "out.png"), "--seed", "7", url=stack.url)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (64, 64)
    assert "@" in done.stdout


def test_the_same_seed_gives_the_same_file(stack: Stack, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        fewstep("generate", "a blue ring", "-o", str(tmp_path / name), "--seed", "3", "--tier", "high", url=stack.url)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_deployments_names_the_tier_and_the_teacher(stack: Stack) -> None:
    shown = fewstep("deployments", url=stack.url).stdout
    assert "shapes" in shown
    assert "high" in shown


def test_the_methods_are_listed_with_their_papers_and_one_with_its_settings(stack: Stack) -> None:
    listed = fewstep("distill", "methods", url=stack.url).stdout
    assert "backward_distil" in listed
    assert "2404.04057" in listed
    assert "guidance_interval" in fewstep("distill", "methods", "kd", url=stack.url).stdout
    wrong = fewstep("distill", "methods", "alchemy", url=stack.url)
    assert wrong.returncode == 1
    assert "choose from" in wrong.stderr


def test_an_error_is_one_sentence_and_no_traceback() -> None:
    done = fewstep("students")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "fewstep up" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_wrong_ending_is_refused_with_those_that_work() -> None:
    done = fewstep("generate", "a red circle", "-o", "out.gif")
    assert done.returncode == 1
    assert ".png" in done.stderr


def test_a_refusal_of_the_server_is_its_own_sentence(stack: Stack, tmp_path: Path) -> None:
    done = fewstep("generate", "a red circle", "--steps", "3", "-o", str(tmp_path / "out.png"), url=stack.url)
    assert done.returncode == 1
    assert "steps" in done.stderr


def test_every_command_explains_itself() -> None:
    for command in ("up", "demo", "generate", "students", "deployments", "promote", "rollback", "distill"):
        done = fewstep(command, "--help")
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) > 5, command
