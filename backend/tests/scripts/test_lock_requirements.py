"""The compiled set, divided into the files that pip reads."""

from collections.abc import Iterator
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from lock_requirements import Package, files_of, needed_by, packages_of

_SERVICE = "peft-studio-backend (pyproject.toml)"
_DEV = "peft-studio-backend (pyproject.toml:dev)"

_COMPILED = """\
# Written by a command.
httpx==0.28.1 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via
    #   peft-studio-backend (pyproject.toml)
    #   pytest
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:cc
    # via torch
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:dd
    # via torch
nvidia-cublas==13.1.1.3 ; sys_platform == 'linux' \\
    --hash=sha256:ee
    # via torch
nvidia-ml-py==13.615.71 \\
    --hash=sha256:ff
    # via peft-studio-backend (pyproject.toml)
pytest==9.2.0 \\
    --hash=sha256:00
    # via peft-studio-backend (pyproject.toml:dev)
torch==2.13.0 \\
    --hash=sha256:11
    # via peft-studio-backend (pyproject.toml)
triton==3.7.1 ; sys_platform == 'linux' \\
    --hash=sha256:22
    # via torch
triton-windows==3.8.0 ; sys_platform == 'win32' \\
    --hash=sha256:33
    # via torch
"""


def test_the_compiled_file_is_read_with_its_versions_markers_and_reasons() -> None:
    packages = packages_of(_COMPILED)
    assert [package.line for package in packages][:3] == [
        "httpx==0.28.1",
        "numpy==2.4.6 ; python_full_version < '3.12'",
        "numpy==2.5.5 ; python_full_version >= '3.12'",
    ]
    assert packages[0].required_by == {_SERVICE, "pytest"}


def test_tests_do_not_come_with_the_service_and_cudas_libraries_only_with_torch() -> None:
    files = files_of(packages_of(_COMPILED))
    lines = {path: {line for line in text.splitlines() if "==" in line} for path, text in files.items()}
    assert lines == {
        "requirements.txt": {
            "httpx==0.28.1",
            "numpy==2.4.6 ; python_full_version < '3.12'",
            "numpy==2.5.5 ; python_full_version >= '3.12'",
            "nvidia-ml-py==13.615.71",
            "torch==2.13.0",
            "triton-windows==3.8.0 ; sys_platform == 'win32'",
        },
        "requirements/cuda-constraints.txt": {
            "nvidia-cublas==13.1.1.3 ; sys_platform == 'linux'",
            "triton==3.7.1 ; sys_platform == 'linux'",
        },
        "requirements/dev.txt": {"pytest==9.2.0"},
    }


@st.composite
def _compiled_sets(draw: st.DrawFn) -> list[Package]:
    """Draw packages that require each other in any way, circles included."""
    names = draw(st.lists(st.text("abcdef", min_size=1, max_size=3), unique=True, min_size=1, max_size=8))
    sources = st.sets(st.sampled_from([_SERVICE, _DEV, *names]), min_size=1)
    return [Package(f"{name}==1.0", draw(sources)) for name in names]


@given(_compiled_sets())
def test_every_package_of_a_list_is_there_with_what_it_requires(packages: list[Package]) -> None:
    needed = needed_by(packages, _SERVICE)
    assert needed == set(_reachable(packages, _SERVICE))
    written = files_of(packages)
    lines = list(chain.from_iterable(text.splitlines() for text in written.values()))
    assert sorted(line for line in lines if "==" in line) == sorted(package.line for package in packages)


def _reachable(packages: list[Package], source: str) -> Iterator[str]:
    """Walk from a source to everything that it requires, one package after the other."""
    waiting, seen = [source], {source}
    while waiting:
        requirer = waiting.pop()
        for package in packages:
            if requirer in package.required_by and package.name not in seen:
                seen.add(package.name)
                waiting.append(package.name)
                yield package.name
