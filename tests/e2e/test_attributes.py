"""What stat, statfs and folder listings tell, that nothing can be changed, and that common tools can read."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.mounts import Mount, mounted
from tests.e2e.tools import (
    KIB,
    MIB,
    SECTOR,
    Word,
    assert_same,
    convert,
    create,
    qemu_img,
    qemu_io,
    raw_file,
    run,
    until,
)

SIZE = 3 * MIB + 5 * SECTOR
CLUSTER = 16 * KIB


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return raw_file(tmp_path_factory.mktemp("attributes") / "content", SIZE, "attributes")


@pytest.fixture(scope="module")
def image(raw: Path) -> Path:
    """An image with a snapshot called before."""
    image = convert(raw, raw.parent / "image.qcow2", cluster_size=CLUSTER)
    qemu_img("snapshot", "-c", "before", image)
    return image


@pytest.fixture(scope="module")
def mount(image: Path) -> Iterator[Mount]:
    with mounted(image) as mount:
        yield mount


def allocated_clusters(image: Path) -> int:
    """How many clusters of the live disk have a place in the file."""
    report: dict[str, int] = json.loads(qemu_img("check", "-U", "--output=json", image))
    return report.get("allocated-clusters", 0)


def test_sizes_are_those_of_the_disk_and_its_clusters(mount: Mount, image: Path) -> None:
    for file in (mount.disk, mount.snapshot("before")):
        status = file.stat()
        assert status.st_size == SIZE
        assert status.st_blksize == CLUSTER
        assert status.st_blocks == allocated_clusters(image) * CLUSTER // 512
        assert status.st_nlink == 1


@pytest.mark.parametrize(
    ("fields", "command"),
    [
        ({"cluster_size": 4096}, "write -q -P 1 4095 2"),
        ({"cluster_size": "2M"}, "write -q -P 1 2M 1"),
        ({"preallocation": "metadata"}, "write -q -P 1 64k 1"),
        ({}, "write -q -z 0 1M"),
        ({"extended_l2": "on"}, "write -q -P 1 0 1"),
    ],
    ids=["two clusters", "large cluster", "preallocated", "zero clusters", "one subcluster"],
)
def test_blocks_count_the_clusters_that_are_allocated(
    fields: dict[str, object], command: str, tmp_path: Path
) -> None:
    image = create(tmp_path / "image.qcow2", 8 * MIB, **fields)
    qemu_io(image, command)
    with mounted(image) as mount:
        status = mount.disk.stat()
        assert status.st_blocks * 512 == allocated_clusters(image) * status.st_blksize


def test_blocks_of_a_disk_with_many_tables_are_counted_in_the_background(tmp_path: Path) -> None:
    image = create(tmp_path / "image.qcow2", 64 * MIB, cluster_size=512)
    qemu_io(image, "write -q -P 1 1M 3M", "write -q -P 1 60M 511")
    with mounted(image) as mount:
        until(lambda: mount.disk.stat().st_blocks == allocated_clusters(image))


def test_blocks_of_an_overlay_include_what_the_backing_file_takes(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.raw", MIB, "base")
    image = create(tmp_path / "image.qcow2", 4 * MIB, "-b", base, "-F", "raw")
    qemu_io(image, "write -q -P 1 3M 64k")
    with mounted(image) as mount:
        assert mount.disk.stat().st_blocks * 512 == MIB + 64 * KIB


def test_file_system_sizes_are_in_clusters(mount: Mount) -> None:
    facts = os.statvfs(mount.folder)
    assert (facts.f_bsize, facts.f_frsize) == (CLUSTER, CLUSTER)
    assert facts.f_blocks == -(-SIZE // CLUSTER)
    assert (facts.f_bfree, facts.f_bavail, facts.f_files, facts.f_namemax) == (0, 0, 4, 255)


@pytest.mark.parametrize(("options", "kib"), [([], 4096), (["--read-ahead", "256K"], 256)])
def test_root_sets_how_far_the_kernel_reads_ahead(options: list[Word], kib: int, image: Path) -> None:
    with mounted(image, *options) as mount:
        device = mount.disk.stat().st_dev
        setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        assert int(setting.read_text()) == kib


def test_files_belong_to_whoever_mounts_and_only_the_owner_may_read(mount: Mount) -> None:
    status, folder = mount.disk.stat(), mount.folder.stat()
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    assert stat.filemode(status.st_mode) == "-r--------"
    assert stat.filemode(folder.st_mode) == stat.filemode(mount.snapshots.stat().st_mode) == "dr-x------"


@pytest.mark.parametrize(
    ("options", "file_mode", "folder_mode"),
    [
        (["--uid", "1234", "--gid=4321", "--mode", "440"], "-r--r-----", "dr-xr-x---"),
        (["--uid=1234", "--gid=4321", "--mode=777"], "-r--r--r--", "dr-xr-xr-x"),
        (["-o", "uid=1234,gid=4321,mode=0444"], "-r--r--r--", "dr-xr-xr-x"),
    ],
    ids=["for a group", "never writable", "as mount options"],
)
def test_owner_and_mode_can_be_chosen(
    options: list[Word], file_mode: str, folder_mode: str, image: Path
) -> None:
    with mounted(image, *options) as mount:
        for path, mode in ((mount.snapshot("before"), file_mode), (mount.snapshots, folder_mode)):
            status = path.stat()
            assert (status.st_uid, status.st_gid) == (1234, 4321)
            assert stat.filemode(status.st_mode) == mode


def test_times_and_inode_numbers_stay_the_same_over_a_remount(image: Path) -> None:
    def facts(mount: Mount) -> list[tuple[int, ...]]:
        found = [path.stat() for path in (mount.disk, mount.snapshots, mount.snapshot("before"))]
        return [(s.st_ino, s.st_mtime_ns, s.st_ctime_ns, s.st_size) for s in found]

    with mounted(image) as mount:
        first = facts(mount)
        assert facts(mount) == first
        assert len({number for number, *_ in first}) == 3
    with mounted(image) as mount:
        assert facts(mount) == first


def test_folders_list_exactly_the_disk_and_its_snapshots(mount: Mount) -> None:
    listed = {entry.name: (entry.is_dir(), entry.inode()) for entry in os.scandir(mount.folder)}
    disk, snapshots = mount.disk.stat(), mount.snapshots.stat()
    assert listed == {"disk.raw": (False, disk.st_ino), "snapshots": (True, snapshots.st_ino)}
    assert [file.name for file in mount.snapshots.iterdir()] == ["before.raw"]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("disk", errno.ENOENT),
        ("snapshots/before", errno.ENOENT),
        ("snapshots/before.raw/x", errno.ENOTDIR),
        ("disk.raw/x", errno.ENOTDIR),
        ("n" * 255, errno.ENOENT),
    ],
)
def test_looking_up_a_missing_name_fails_as_on_any_file_system(mount: Mount, name: str, number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        (mount.folder / name).stat()
    assert caught.value.errno == number


CHANGES: dict[str, Callable[[Path], object]] = {
    "open to write": lambda folder: os.open(folder / "disk.raw", os.O_WRONLY),
    "open to read and write": lambda folder: os.open(folder / "snapshots" / "before.raw", os.O_RDWR),
    "open to truncate": lambda folder: os.open(folder / "disk.raw", os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda folder: os.truncate(folder / "disk.raw", 0),
    "create": lambda folder: os.open(folder / "new", os.O_CREAT | os.O_WRONLY),
    "unlink": lambda folder: os.unlink(folder / "disk.raw"),  # noqa: PTH108 - the system call is meant
    "unlink a snapshot": lambda folder: os.unlink(folder / "snapshots" / "before.raw"),  # noqa: PTH108
    "rename": lambda folder: os.rename(folder / "disk.raw", folder / "other"),  # noqa: PTH104
    "link": lambda folder: os.link(folder / "disk.raw", folder / "other"),
    "symlink": lambda folder: os.symlink("disk.raw", folder / "other"),  # noqa: PTH211
    "make a folder": lambda folder: (folder / "new").mkdir(),
    "remove a folder": lambda folder: (folder / "snapshots").rmdir(),
    "change the mode": lambda folder: (folder / "disk.raw").chmod(0o644),
    "change the owner": lambda folder: os.chown(folder / "disk.raw", 1, 1),
    "change the times": lambda folder: os.utime(folder / "disk.raw"),
    "set an attribute": lambda folder: os.setxattr(folder, "user.qcowfs.pid", b"1"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_refused_as_on_a_read_only_file_system(
    mount: Mount, change: Callable[[Path], object]
) -> None:
    with pytest.raises(OSError, match="Read-only file system") as caught:
        change(mount.folder)
    assert caught.value.errno == errno.EROFS


def test_a_writable_remount_still_writes_nothing(image: Path) -> None:
    """The kernel may be told `rw`, but the daemon refuses as well."""
    with mounted(image) as mount:
        run("mount", "-i", "-o", "remount,rw", mount.folder)
        with pytest.raises(OSError, match="Read-only file system"):
            os.open(mount.disk, os.O_WRONLY)
        with pytest.raises(OSError, match="Read-only file system"):
            os.truncate(mount.disk, 0)
        assert mount.disk.stat().st_size == SIZE


def test_setuid_and_device_files_are_off(mount: Mount) -> None:
    (line,) = [x for x in Path("/proc/self/mounts").read_text().splitlines() if f" {mount.folder} " in x]
    source, _, kind, options = line.split(" ")[:4]
    assert (source, kind) == (str(mount.image), "fuse.qcowfs")
    assert {"ro", "nosuid", "nodev", "default_permissions"} <= set(options.split(","))
    assert "allow_other" not in options


COPIES: list[list[str]] = [
    ["cp", "--sparse=always"],
    ["cp", "--sparse=never", "--reflink=auto", "--preserve=all"],
    ["dd", "bs=1M", "iflag=direct", "if={0}", "of={1}"],
    ["dd", "bs=3000", "if={0}", "of={1}"],
    ["qemu-img", "convert", "-f", "raw", "-O", "raw"],
]


@pytest.mark.parametrize("command", COPIES, ids=lambda words: " ".join(words[:3]))
def test_copying_tools_read_the_disk(mount: Mount, raw: Path, command: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    words = [word.format(mount.disk, copy) for word in command]
    run(*words, *([] if command[0] == "dd" else [mount.disk, copy]))
    assert_same(copy, raw)


def test_a_loop_device_with_direct_reads_shows_the_disk(mount: Mount, raw: Path, tmp_path: Path) -> None:
    device = run("losetup", "--find", "--show", "--read-only", "--direct-io=on", mount.disk).stdout.strip()
    try:
        copy = tmp_path / "copy"
        run("dd", f"if={device}", f"of={copy}", "bs=64k")
    finally:
        run("losetup", "-d", device)
    assert_same(copy, raw)
