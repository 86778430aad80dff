"""Storage behind the xet protocol, as hf_xet speaks it over plain HTTP: xorbs and shards in, reconstructions out.

A file is cut into chunks. Chunks travel in xorbs (a run of compressed chunks), a shard says of which chunks of which
xorbs each file consists. Formats: https://huggingface.co/docs/xet. In plain Python, so that the server can hand out the
bytes of a file that came as xet to a client without xet, and shares no code with the client that it tests.
"""

import hashlib
import struct
from typing import NamedTuple

HEADER = struct.Struct('<B3sB3s')  # of a chunk: version, packed size, compression, size
FILE_ENTRY = struct.Struct('<32sIIQ')  # of a file in a shard: hash, flags, number of segments, unused
SEGMENT = struct.Struct('<32sIIII')  # xorb, flags, bytes, first chunk, chunk after the last
SHARD_MAGIC = b'HFRepoMetaData\0'
FLAG_VERIFICATION, FLAG_METADATA = 1 << 31, 1 << 30


class Chunk(NamedTuple):
    start: int  # of the header in the xorb
    stop: int  # behind the packed bytes
    compression: int  # 0 none, 1 LZ4, 2 LZ4 of bytes grouped by their place in 4-byte words
    size: int  # unpacked


class Segment(NamedTuple):
    xorb: str
    first: int
    last: int  # exclusive


def hash_text(raw):
    """A xet hash is printed as four little-endian 64-bit words, so not in the order of its bytes."""
    return ''.join(f'{word:016x}' for word in struct.unpack('<4Q', raw))


def split_xorb(data):
    chunks, at = [], 0
    while at < len(data) and data[at : at + 7] != b'XETBLOB':  # a footer with hashes may follow the chunks
        version, packed, compression, size = HEADER.unpack_from(data, at)
        start, at = at, at + HEADER.size + int.from_bytes(packed, 'little')
        if version != 0 or compression > 2 or at > len(data):
            raise ValueError('not a xorb: a chunk header makes no sense')
        chunks.append(Chunk(start, at, compression, int.from_bytes(size, 'little')))
    return chunks


def unpack_chunk(data, chunk):
    packed = data[chunk.start + HEADER.size : chunk.stop]
    plain = packed if chunk.compression == 0 else lz4_frame(packed)
    if len(plain) != chunk.size:
        raise ValueError(f'a chunk has {len(plain)} bytes, its header says {chunk.size}')
    if chunk.compression == 2:
        out, at = bytearray(len(plain)), 0
        for place in range(4):
            count = len(range(place, len(plain), 4))
            out[place::4] = plain[at : at + count]
            at += count
        plain = bytes(out)
    return plain


def lz4_frame(data):
    magic, flags = struct.unpack_from('<IB', data)
    if magic != 0x184D2204:
        raise ValueError('not an LZ4 frame')
    at = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)  # magic, flags, block size, [size], [dictionary], checksum
    out = bytearray()
    while size := struct.unpack_from('<I', data, at)[0]:
        block = data[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        if size >> 31:  # stored, because it did not get smaller
            out += block
        else:
            lz4_block(block, out)
        at += 4 + len(block) + 4 * bool(flags & 16)
    return bytes(out)


def lz4_block(data, out):
    """Appends to out, which may hold earlier blocks of the frame that this one refers to."""
    at = 0
    while True:
        token = data[at]
        length, at = run_length(data, token >> 4, at + 1)
        out += data[at : at + length]
        at += length
        if at >= len(data):  # the last sequence has literals only
            return
        offset = data[at] | data[at + 1] << 8
        length, at = run_length(data, token & 15, at + 2)
        length += 4
        start = len(out) - offset
        if offset == 0 or start < 0:
            raise ValueError('an LZ4 match points outside of what is unpacked')
        if offset >= length:
            out += out[start : start + length]
        else:  # the match overlaps with what it produces: it repeats
            out += (out[start:] * (length // offset + 1))[:length]


def run_length(data, length, at):
    """Four bits that are all set go on in the next bytes, up to one that is not 255."""
    if length == 15:
        more = 255
        while more == 255:
            more = data[at]
            length, at = length + more, at + 1
    return length, at


def read_shard(data):
    """Yields (hash, sha256, segments) of each file that the shard describes."""
    if not data.startswith(SHARD_MAGIC):
        raise ValueError('not a shard')
    at = 48  # behind magic, version and footer size
    while True:
        raw, flags, count, _ = FILE_ENTRY.unpack_from(data, at)
        if raw == b'\xff' * 32:  # ends the list of files; what follows repeats the xorbs
            return
        at += FILE_ENTRY.size
        rows = [SEGMENT.unpack_from(data, at + i * SEGMENT.size) for i in range(count)]
        at += count * SEGMENT.size * (2 if flags & FLAG_VERIFICATION else 1)
        if not flags & FLAG_METADATA:
            raise ValueError('a file in the shard has no sha256')
        sha256 = hash_text(data[at : at + 32])
        at += SEGMENT.size
        yield hash_text(raw), sha256, [Segment(hash_text(row[0]), row[3], row[4]) for row in rows]


class XetStore:
    """Xorbs by their hash, files by their xet hash and by their sha256."""

    def __init__(self):
        self.xorbs = {}  # hash: (data, chunks)
        self.files = {}  # xet hash: segments
        self.hash_of = {}  # sha256: xet hash

    def put_xorb(self, name, data):
        """Whether it is new."""
        if name in self.xorbs:
            return False
        self.xorbs[name] = data, split_xorb(data)
        return True

    def put_shard(self, data):
        """Registers the files of a shard if their bytes have the sha256 that it says; returns {sha256: bytes}."""
        found = {}
        for name, sha256, segments in read_shard(data):
            try:
                plain = self.read(segments)
                if hashlib.sha256(plain).hexdigest() != sha256:
                    raise ValueError(f'the chunks of {sha256} have another sha256')
            except (ValueError, IndexError, struct.error):
                for segment in segments:  # or a second try would find the damaged xorb and send no better one
                    self.xorbs.pop(segment.xorb, None)
                raise
            self.files[name], self.hash_of[sha256] = segments, name
            found[sha256] = plain
        return found

    def read(self, segments):
        parts = []
        for xorb, first, last in segments:
            if xorb not in self.xorbs:
                raise ValueError(f'xorb {xorb} was not uploaded')
            data, chunks = self.xorbs[xorb]
            parts += [unpack_chunk(data, chunks[i]) for i in range(first, last)]
        return b''.join(parts)

    def plan(self, name, start, stop, url):
        """Reconstruction (version 1) of the bytes [start, stop) of a file; None if it starts behind the end.

        url(xorb) is where its bytes are. Whole chunks are handed out: the client cuts the first and the last.
        """
        at, skip, terms, spans = 0, None, [], {}
        for xorb, first, last in self.files[name]:
            sizes = [chunk.size for chunk in self.xorbs[xorb][1]]
            wanted = []
            for i in range(first, last):
                if at < stop and at + sizes[i] > start:
                    wanted.append(i)
                    skip = start - at if skip is None else skip
                at += sizes[i]
            if wanted:
                span = wanted[0], wanted[-1] + 1
                size = sum(sizes[slice(*span)])
                terms.append({'hash': xorb, 'unpacked_length': size, 'range': {'start': span[0], 'end': span[1]}})
                old = spans.get(xorb, span)
                spans[xorb] = min(old[0], span[0]), max(old[1], span[1])
        if skip is None:
            return None
        fetch = {xorb: [self._fetch(xorb, *span, url(xorb))] for xorb, span in spans.items()}
        return {'offset_into_first_range': skip, 'terms': terms, 'fetch_info': fetch}

    def _fetch(self, xorb, first, last, url):
        chunks = self.xorbs[xorb][1]
        place = {'start': chunks[first].start, 'end': chunks[last - 1].stop - 1}  # inclusive, as in a Range header
        return {'range': {'start': first, 'end': last}, 'url': url, 'url_range': place}
