"""Reading a report's page: its figures, its texts, its pictures, and whether its elements are closed."""

from __future__ import annotations

import base64
import struct
import zlib
from html.parser import HTMLParser

import numpy as np

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Attributes: `figures` (key to values, in order), `text`, `images`, `tags`, and `captions` of tables."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.figures, self.images, self.tags, self.attributes, self.captions = {}, [], [], [], []
        self.text = ""
        self._open = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "data":
            self.figures.setdefault(attributes["data-key"], []).append(float(attributes["value"]))
        elif tag == "img":
            self.images.append((attributes["alt"], attributes["src"]))
        elif tag == "caption":
            self.captions.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data
        if "caption" in self._open:
            self.captions[-1] += data


def levels(source):
    """Return the opacities of a picture, in [0, 1], as a matrix."""
    prefix = "data:image/png;base64,"
    assert source.startswith(prefix)
    data = base64.b64decode(source[len(prefix) :], validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack_from(">I", data, place)
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size) == (zlib.crc32(kind + body),)
        chunks[kind] = body
        place += size + 12
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return np.frombuffer(chunks[b"tRNS"], np.uint8)[lines[:, 1:]] / 255
