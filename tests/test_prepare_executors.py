"""The same pipeline on Slurm: what is submitted, and that its jobs give the same catalogue. `sbatch` is a stand-in."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from helpers import run_forked
from prepare_case import draw, files_of, needs_prepare

from aliblip.runtime.mistakes import UsageError

pytestmark = needs_prepare

SBATCH = """#!/bin/sh
n=$(ls "{folder}" | grep -c job)
cat > "{folder}/job-$n.slurm"
[ -f "$1" ] && cp "$1" "{folder}/job-$n.slurm"
for last; do :; done
[ -f "$last" ] && cp "$last" "{folder}/job-$n.slurm"
echo "Submitted batch job 4$n"
"""
# What a job of the array does, in a process of its own.
JOB = """
import sys
from datatrove.tools.launch_pickled_pipeline import main
main()
"""
OPTIONS = json.dumps({"partition": "cpu", "time": "01:00:00", "qos": ""})


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of what was submitted."""
    folder, tools = tmp_path / "submitted", tmp_path / "bin"
    folder.mkdir()
    tools.mkdir()
    for name, text in {"sbatch": SBATCH.format(folder=folder), "scontrol": "#!/bin/sh\necho localhost\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("aliblip.data.prepare_card._Titles.languages", lambda titles: ())
    return folder


def prepare(output, *flags):
    from aliblip.prepare import main

    return main([*map(str, flags), "--output_dir", str(output)])


def test_jobs_are_submitted_and_the_same_command_goes_on(cluster, tmp_path, capsys):
    flags = [*draw(tmp_path / "data", 30), "--rows_per_task", "10"]
    prepare(tmp_path / "local" / "out", *flags, "--workers", "1")
    out = tmp_path / "slurm" / "out"
    script = tmp_path / "job.py"
    script.write_text(JOB)
    capsys.readouterr()
    phases = ["read", "compare", "write"]
    for number, phase in enumerate(phases):
        prepare(out, *flags, "--executor", "slurm", "--executor_options", OPTIONS, "--workers", "2")
        assert "type the same command again when they have ended" in capsys.readouterr().out
        launch = (out / "work/logs" / phase / "launch_script.slurm").read_text()
        assert f"#SBATCH --job-name=aliblip-prepare-{phase}" in launch
        assert "#SBATCH --partition=cpu" in launch and "launch_pickled_pipeline" in launch
        assert len(list(cluster.glob("job-*"))) == 2 * (number + 1)  # the array, and the job that sums up its notes
        tasks = json.loads((out / "work/logs" / phase / "ranks_to_run.json").read_text())
        for task in range(len(tasks)):
            env = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "localhost", "PATH": os.environ["PATH"]}
            pickled = out / "work/logs" / phase / "executor.pik"
            result = run_forked([sys.executable, script, pickled], env=env)
            assert result.returncode == 0, result.stderr
    prepare(out, *flags, "--executor", "slurm", "--executor_options", OPTIONS, "--workers", "2")
    assert files_of(out) == files_of(tmp_path / "local" / "out")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--executor", "slurm"], "needs partition and time"),
        (
            ["--executor", "slurm", "--executor_options", '{"partition": "a", "time": "1", "x": 1}'],
            "does not take them",
        ),
        (["--executor", "slurm", "--executor_options", "[]"], "--executor_options is a list"),
    ],
)
def test_mistakes_of_executors_are_told(cluster, tmp_path, flags, told):
    with pytest.raises(UsageError, match=told):
        prepare(tmp_path / "out", *draw(tmp_path / "data", 4), *flags)


def test_without_sbatch_or_ray_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(tmp_path)))
    data = draw(tmp_path / "data", 4)
    with pytest.raises(UsageError, match="needs sbatch, which is not here"):
        prepare(tmp_path / "out", *data, "--executor", "slurm")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="--executor ray needs Ray: .* -m pip install ray"):
        prepare(tmp_path / "out", *data, "--executor", "ray")
