"""Compare the built archives with the source tree: licence, type marker and every data file must be inside."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

dist = Path(sys.argv[1])
tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=False)
files = tracked.stdout.splitlines() or [str(p) for p in Path("src").rglob("*") if p.is_file()]
package = {f.removeprefix("src/") for f in files if f.startswith("src/expunge/") and Path(f).is_file()}

(wheel,) = dist.glob("*.whl")
inside = set(zipfile.ZipFile(wheel).namelist())
missing = sorted(package - inside)
if not any(name.endswith("licenses/LICENSE") for name in inside):
    missing.append("LICENSE")
strange = sorted(n for n in inside if not n.startswith(("expunge/", "expunge-")))

(source,) = dist.glob("*.tar.gz")
with tarfile.open(source) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "pyproject.toml"}
missing += [f"{name} (source archive)" for name in sorted(wanted - names)]
missing += [f"{name} (source archive)" for name in sorted({f"src/{n}" for n in package} - names)]

if missing or strange:
    sys.exit(f"missing from the archives: {missing}; does not belong there: {strange}")
data = sorted(n for n in package if not n.endswith(".py"))
sys.stdout.write(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 1000:.0f} kB; data: {', '.join(data)}\n")
