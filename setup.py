"""What setup.cfg cannot say: the cffi module, the C programs, the manual pages."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CFLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
# Static: they run where the host's libraries are not to be seen (a container's root) or where a
# library's constructor would be one more thing that can fail (the supervisor).
PROGRAMS = ("supervisor", "spawner", "init", "tracer", "uaccess")
# Relative: setuptools wants the paths of data files so. build/ is never committed.
PAGES = {"man5": "build/man/nsfs.5", "man8": "build/man/nsfs.8"}


def compile_c(
    source: Path,
    target: Path,
    *flags: str,
    libraries: tuple[str, ...] = (),
    compiler: str = os.environ.get("CC", "gcc"),
) -> None:
    """Compile one file into one program or library, which appears complete or not at all.

    The old one may be running (ETXTBSY), so it is replaced, not written to.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(target.name + ".new")
    command = [*shlex.split(compiler), *CFLAGS, *flags, "-o", str(new), str(source), *libraries]
    if subprocess.run(command).returncode:
        raise CompileError(f"{source} was not compiled")
    new.replace(target)


def compile_enter(source: Path, libexec: Path) -> None:
    """Compile nsfs-enter, with musl where musl-gcc is found.

    It is started for each session, and glibc takes longer to start up (60 us, for it asks the
    processor what it can, which in a virtual machine the host answers) than nsfs-enter to enter.
    """
    target = libexec / "nsfs-enter"
    if "CC" in os.environ or not shutil.which("musl-gcc"):
        compile_c(source / "enter.c", target, "-static", "-s")
        return
    ask = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True)
    kernel_headers = ("/usr/include", f"/usr/include/{ask.stdout.strip()}")
    # The macros of its headers do not survive -Wconversion, which scripts/check has for the source.
    flags = ["-Wno-conversion", "-Wno-sign-conversion", "-static", "-no-pie", "-s"]
    flags += [flag for each in kernel_headers for flag in ("-idirafter", each)]
    compile_c(source / "enter.c", target, *flags, compiler="musl-gcc")


def compile_marker(source: Path, libexec: Path) -> None:
    """Compile nsfs-marker, with libbpf and the BPF program where libbpf and clang are found.

    Without them kernel lines are attributed by context only; nothing else is missing.
    """
    program, bpf = source / "marker.c", libexec / "mark.bpf.o"
    libraries = ("-lbpf", "-lelf", "-lz")
    clang = shutil.which(os.environ.get("CLANG", "clang"))
    try:
        if clang is None:
            raise CompileError("clang is not there")
        compile_c(
            program, libexec / "nsfs-marker", "-DNSFS_LIBBPF", "-static", "-s", libraries=libraries
        )
        new = bpf.with_name(bpf.name + ".new")
        flags = ["-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", "-target", "bpf"]
        if subprocess.run([clang, *flags, "-c", "-o", new, source / "mark.bpf.c"]).returncode:
            raise CompileError("mark.bpf.c was not compiled")
        new.replace(bpf)
    except CompileError as error:
        print(f"kernel lines will be attributed by context only: {error}", file=sys.stderr)
        bpf.unlink(missing_ok=True)
        compile_c(program, libexec / "nsfs-marker", "-static", "-s")


def build_pages() -> None:
    """Make the manual pages that PAGES names from man/NAME.rst."""
    # Only here: nothing else that setup.py is run for needs docutils.
    from docutils.core import publish_file
    from docutils.utils import SystemMessage

    for page in map(Path, PAGES.values()):
        page.parent.mkdir(parents=True, exist_ok=True)
        try:
            publish_file(
                source_path=f"man/{page.name}.rst",
                destination_path=str(page),
                writer="manpage",
                # A page with an error in it, or what may be one, is not installed.
                settings_overrides={"halt_level": 2, "report_level": 5},
            )
        except SystemMessage as error:
            raise CompileError(str(error)) from None


class build_all(build_ext):
    """The cffi module, then the C programs, into nsfs/libexec of the tree or of the wheel.

    The pages as well, though they are no extension: every way to install runs this before it
    looks for data files.
    """

    def run(self) -> None:
        super().run()
        top = Path() if self.inplace else Path(self.build_lib)
        source, libexec = Path("nsfs/csrc"), top / "nsfs/libexec"
        for name in PROGRAMS:
            compile_c(source / f"{name}.c", libexec / f"nsfs-{name}", "-static", "-s")
        compile_enter(source, libexec)
        compile_marker(source, libexec)
        compile_c(
            source / "interposer.c",
            libexec / "nsfs-interposer.so",
            "-shared",
            "-fPIC",
            "-s",
            # It calls libfuse, which pyfuse3 loads for itself alone (RTLD_LOCAL).
            libraries=("-lfuse3", "-ldl"),
        )
        build_pages()


setup(
    cffi_modules=["nsfs/_syscalls_build.py:ffi"],
    cmdclass={"build_ext": build_all},
    data_files=[
        *((f"share/man/{section}", [page]) for section, page in PAGES.items()),
        ("share/doc/nsfs", ["NEWS.rst", "nsfs.conf.example"]),
        # Below /usr/local, where systemd looks, when nsfs is installed for the whole system.
        ("lib/systemd/system", ["systemd/nsfs.service"]),
    ],
)
