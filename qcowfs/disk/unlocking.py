"""From an encrypted image and a passphrase to the way its guest data is read and written.

Owns where an image keeps its LUKS area, what is read of it, and what a passphrase that does not fit means.
Must not know where passphrases come from or how a cipher works. Implements "Full disk encryption header
pointer" and "Data encryption" of the specification.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from qcowfs.data.guest_data import DataPort, EncryptedData, PlainData
from qcowfs.disk.keys import Keys
from qcowfs.errors import BadPassphrase, CorruptImage, QcowError, UnsupportedFeature
from qcowfs.format import extensions as ext
from qcowfs.format.header import CRYPT_AES, CRYPT_LUKS, CRYPT_NAMES, Header
from qcowfs.format.luks import HEADER_SIZE, MOST_ROUNDS, LuksHeader, unpack_pointer
from qcowfs.host.hostfile import HostFile
from qcowfs.host.waiting import run_in_thread

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LuksArea:
    """A checked LUKS header and where in the image's file its area lies, in bytes."""

    header: LuksHeader
    offset: int
    length: int


async def open_guest_data(
    header: Header, label: str, file: HostFile, data_file: HostFile, keys: Keys
) -> DataPort:
    """How the guest data of an image in `data_file` is read and written; asks `keys` if it is encrypted.

    Raises `UsageError` without a passphrase, `BadPassphrase` for a wrong one, `CorruptImage` and
    `UnsupportedFeature` for a LUKS header that cannot be used, each in the name of `label`.
    """
    geometry = header.geometry
    if header.crypt_method == CRYPT_LUKS:
        area = await load_area(file, header, label)
        passphrase = keys.get(file.name, label, CRYPT_NAMES[CRYPT_LUKS])
        _, key = await unlock_area(file, area, passphrase, label)
        from qcowfs.codecs.encryption import make_cipher

        cipher = make_cipher(area.header.cipher, area.header.mode, key)
        return EncryptedData(data_file, geometry, cipher, by_guest=False)
    if header.crypt_method == CRYPT_AES:
        passphrase = keys.get(file.name, label, CRYPT_NAMES[CRYPT_AES])
        from qcowfs.codecs.encryption import make_legacy_cipher

        log.warning("%s: legacy AES cannot tell a wrong passphrase; with one, everything is noise", label)
        return EncryptedData(data_file, geometry, make_legacy_cipher(passphrase), by_guest=True)
    keys.note(file.name, encrypted=False)
    return PlainData(data_file, geometry)


async def load_area(file: HostFile, header: Header, label: str) -> LuksArea:
    """The LUKS header of an image, held against every bound; raises `QcowError` in the name of `label`."""
    from qcowfs.codecs.luks_keys import check_header

    try:
        pointer = header.extension(ext.ENCRYPTION_HEADER)
        if pointer is None:
            raise CorruptImage("is encrypted (LUKS) but does not tell where its LUKS header is")
        offset, length = unpack_pointer(pointer)
        if not offset or not header.geometry.is_cluster_aligned(offset):
            raise CorruptImage(f"LUKS header offset {offset:#x} is not cluster aligned")
        luks = LuksHeader.unpack(await _read(file, offset, HEADER_SIZE))
        check_header(luks, length)
    except QcowError as error:
        raise type(error)(f"{label}: {error}") from None
    return LuksArea(luks, offset, length)


async def unlock_area(file: HostFile, area: LuksArea, passphrase: bytes, label: str) -> tuple[int, bytes]:
    """The number of the key slot that the passphrase opens, and the master key.

    Takes as long as the slots' iterations ask for. Raises `BadPassphrase` in the name of `label`, and
    `UnsupportedFeature` where they ask for too much.
    """
    from qcowfs.codecs.luks_keys import count_rounds, unlock

    rounds = count_rounds(area.header)
    if rounds > MOST_ROUNDS:
        raise UnsupportedFeature(
            f"{label}: trying a passphrase in every key slot takes {rounds} rounds, more than {MOST_ROUNDS}, "
            "which wastes time on purpose; if you trust the image, find the costly slots by qcowfs key list "
            "and empty one by qemu-img amend -o encrypt.state=inactive,encrypt.keyslot=N"
        )
    found = await run_in_thread(unlock, area.header, await load_materials(file, area), passphrase)
    if found is None:
        hint = "; the newline at its end counts" if passphrase.endswith(b"\n") else ""
        raise BadPassphrase(f"{label}: the passphrase opens none of the image's key slots{hint}")
    return found


async def load_materials(file: HostFile, area: LuksArea) -> dict[int, bytes]:
    """The key material of each active slot, by its number."""
    size = area.header.material_size
    return {
        number: (await _read(file, area.offset + slot.key_offset, size)).ljust(size, b"\0")
        for number, slot in enumerate(area.header.slots)
        if slot.active
    }


async def _read(file: HostFile, offset: int, size: int) -> bytes:
    """As much of the range as the host file holds."""
    buffer = bytearray(max(0, min(size, file.facts().size - offset)))
    await file.read_into([(offset, memoryview(buffer))])
    return bytes(buffer)
