"""Checks that no object built for one instruction set leaks code into the whole program.

    python tools/simd_gate.py [BUILD_FOLDER ...]

A csrc/cpu/*_simd.cpp is compiled once per instruction set. If such an object defines a weak symbol (an inline function,
a standard template), the linker keeps one copy for everybody, possibly the AVX-512 one, and a machine without AVX-512
dies of an illegal instruction somewhere else. So: no weak symbols, and every global one lies in the namespace of its
own instruction set.

Exit status: 0 green, 1 a red object, 2 nothing to check (build first) or no `nm`.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("avx512", "avx2", "portable")


def faults(listing: str, isa: str) -> list[str]:
    """The lines of `nm -C --defined-only` that break the rule for an object built for `isa`."""
    found = []
    for line in listing.splitlines():
        kind, _, name = line.strip().partition(" ")[2].partition(" ")
        if name == "DW.ref.__gxx_personality_v0":  # where the unwinder finds C++'s handler: an address, no code
            continue
        inside = re.match(rf"(?:guard variable for |vtable for )?sl::cpu::{isa}::", name)
        if kind in "WVuwv" or (kind.isupper() and kind != "U" and not inside):
            found.append(f"{kind} {name}")
    return found


def main(folders: list[str]) -> int:
    sources = sorted((ROOT / "csrc").rglob("*_simd.cpp"))
    roots = [Path(f) for f in folders] or sorted((ROOT / "build").glob("temp.*"))
    objects = sorted(o for root in roots for o in root.rglob("*_simd.cpp.*.o") if o.suffixes[-2][1:] in ISAS)
    built = {o.name.split(".")[0] for o in objects}
    missing = [s.name for s in sources if not any(name.endswith(s.stem) for name in built)]
    if missing:
        print(f"simd gate: no objects of {', '.join(missing)} under build/: build first (make .venv/.built)")
        return 2
    red = 0
    for path in objects:
        isa = path.suffixes[-2][1:]
        try:
            done = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"simd gate: nm does not work: {error}")
            return 2
        wrong = faults(done.stdout, isa)
        red += bool(wrong)
        print(f"{'RED  ' if wrong else 'green'} {path.name}")
        for fault in wrong:
            print(f"      {fault}")
    print(f"simd gate: {len(objects)} objects, {red} red")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
