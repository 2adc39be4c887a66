"""What is handed out: a wheel with three packages, and a README whose figures were measured."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"slmrec", "compress", "export"}
    assert all(name.endswith((".py", ".typed")) for name in names if ".dist-info/" not in name)
    packaged = {name for name in names if name.endswith(".py")}
    assert packaged == {
        str(p.relative_to(ROOT)) for n in ("slmrec", "compress", "export") for p in (ROOT / n).rglob("*.py")
    }


def test_the_continuous_integration_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_the_readmes_tables_are_those_of_the_recorded_results():
    script = ROOT / "benchmarks" / "readme.py"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_reference_is_the_commands_own_help():
    module = [sys.executable, "-m", "slmrec.cli.reference"]  # click keeps what it was first asked in a process
    made = subprocess.run(module, capture_output=True, text=True, check=True, cwd=ROOT)
    assert (ROOT / "docs" / "cli.md").read_text() == made.stdout, "python -m slmrec.cli.reference > docs/cli.md"


def test_links_between_the_pages_lead_somewhere():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
