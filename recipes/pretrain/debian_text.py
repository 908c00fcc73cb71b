"""English text from Debian's documentation and source packages, for pretraining where no data hub answers.

    python recipes/pretrain/debian_text.py --out corpus

needs Debian with `apt-get` and `dpkg-deb`, no root, downloads about 800 MB and unpacks one package at a time, at most
1.5 GB. It writes a .jsonl file for each package, a line for each document: {"source": file, "text": its paragraphs}.
Of source packages it takes the comments. Markup, code, menus, what is not English prose, and every paragraph that an
earlier document had are left out. Nothing is installed.
"""

import argparse
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Of Debian 12; a name that the release at hand does not have is reported and left out.
PACKAGES = (
    *("linux-doc-6.1", "rust-doc", "openjdk-17-doc", "cppreference-doc-en-html", "erlang-doc", "libboost1.74-doc"),
    *("python3.11-doc", "python-django-doc", "python-scipy-doc", "python-pandas-doc", "python-sympy-doc", "ghc-doc"),
    *("lilypond-doc-html", "apache2-doc", "sqlite3-doc", "postgresql-doc-15", "perl-doc", "debian-handbook"),
    *("anarchism", "dict-gcide", "dict-wn", "dict-foldoc", "jargon-text", "fortunes"),
    *("libreoffice-help-en-us", "installation-guide-amd64", "qtbase5-doc-html", "racket-doc", "octave-doc"),
    *("maxima-doc", "git-doc", "postgis-doc", "debian-policy", "developers-reference", "harden-doc", "exim4-doc-html"),
    *("debian-reference-en", "aptitude-doc-en", "debian-faq", "manpages", "manpages-dev"),
    *("linux-doc-6.12", "python-sklearn-doc", "python-statsmodels-doc", "python-astropy-doc", "petsc3.18-doc"),
    *("sagemath-doc", "lazarus-doc-2.2", "llvm-19-doc", "linux-source-6.1", "gcc-12-source", "golang-1.19-src"),
    *("rust-src", "golang-github-aws-aws-sdk-go-dev", "golang-google-api-dev"),
)
DROPPED = re.compile(r"<(script|style|head|nav|footer|pre|svg|math|select)\b.*?</\1\s*>|<!--.*?-->", re.I | re.S)
BLOCK = re.compile(
    r"</?(?:p|div|h[1-6]|li|ul|ol|dl|dt|dd|table|tr|td|th|section|article|blockquote|br|hr|body|main|header|aside)\b"
    r"[^>]*>",
    re.I,
)
TAG = re.compile(r"<[^>]*>")
POD_MARK = re.compile(r"\b[A-Z]<+ ?([^<>]*?) ?>+")
ROFF_FONT = re.compile(r"\\f(?:\[\w*\]|\(..|.)|\\[&%/,|^]|\\s[+-]?\d+")
ROFF_SIGNS = {r"\-": "-", r"\(aq": "'", r"\(dq": '"', r"\(co": "(c)", r"\(bu": "", r"\e": "\\", r"\ ": " "}
WORD = re.compile(r"[A-Za-z']+")
SOURCE = (".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".go", ".rs")
COMMENT = re.compile(r"/(?:\*.*?\*/|/[^\n]*(?:\n[ \t]*//[^\n]*)*)", re.S)  # a slash first: regexes find that fast
COMMENT_MARK = re.compile(r"^[ \t]*(?:/\*+!?|\*+/|\*|//[/!]?)[ \t]?|\*+/[ \t]*$", re.M)
COMMON = frozenset(
    re.findall(
        r"\w+",
        "the of and to a in is that for it as be on with by are this or an not from at which if you can will have has "
        "was were but when all one may its no he she they we i his her their there been used use",
    )
)
SHORTEST = 300  # characters that make a document


def paragraphs(path: str, text: str) -> Iterator[str]:
    """The paragraphs of a file without its markup, by what its name says it is."""
    if re.search(r"\.x?html?$", path):
        text = html.unescape(TAG.sub("", BLOCK.sub("\n\n", DROPPED.sub("\n\n", text))))
    elif re.search(r"\.pod$", path):
        blocks = [block for block in re.split(r"\n\s*\n", text) if not block.startswith(("=", " ", "\t"))]
        text = "\n\n".join(POD_MARK.sub(r"\1", POD_MARK.sub(r"\1", block)) for block in blocks)
    elif path.endswith(SOURCE):
        text = "\n\n".join(COMMENT_MARK.sub("", found) for found in COMMENT.findall(text))
    elif re.search(r"/man/man\d/", path):
        text = _without_roff(text)
    elif path.endswith(".dict.dz"):
        text = re.sub(r"\n(?=\S)", "\n\n", text)  # an entry starts at the margin
    elif "/fortunes/" in path:
        text = re.sub(r"^%$", "", text, flags=re.M)
    for block in re.split(r"\n\s*\n", text):
        yield " ".join(block.split())


def _without_roff(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if line.startswith((".B", ".I", ".R", ".SM")):  # text in another font
            line = line.partition(" ")[2].replace('"', "")
        elif line.startswith((".", "'")):
            line = ""
        lines.append(line)
    text = ROFF_FONT.sub("", "\n".join(lines))
    for sign, plain in ROFF_SIGNS.items():
        text = text.replace(sign, plain)
    return text


def is_prose(paragraph: str) -> bool:
    """Whether it reads like English sentences: enough words, letters, and the words that English cannot do without."""
    words = WORD.findall(paragraph)
    if len(words) < 6 or sum(map(len, words)) + len(words) < 0.75 * len(paragraph):
        return False
    return sum(word.lower() in COMMON for word in words) >= 0.15 * len(words)


def read(file: Path) -> str | None:
    """A file's text, unpacked; None for what holds no text for us."""
    name = file.name.removesuffix(".gz")
    inside = file.as_posix()
    wanted = name.endswith((".html", ".htm", ".xhtml", ".txt", ".pod", ".dict.dz", *SOURCE)) or "/man/man" in inside
    if not wanted and not ("/fortunes/" in inside and not file.suffix):
        return None
    if re.search(r"copyright|changelog|/LICEN|/NEWS", inside, re.I):
        return None
    data = file.read_bytes()
    if data[:2] == b"\x1f\x8b":  # dictionaries too are gzip
        data = gzip.decompress(data)
    text = data.decode("utf-8", errors="replace")
    return None if text.count("�") > len(text) / 1000 else text  # another encoding, or no text at all


def documents(folder: Path, seen: set[bytes]) -> Iterator[dict]:
    """The documents of an unpacked package; `seen` holds the paragraphs of all so far, and grows."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        text = read(file)
        if text is None:
            continue
        source = file.relative_to(folder).as_posix()
        kept = []
        for paragraph in paragraphs("/" + source.removesuffix(".gz"), text):
            if not is_prose(paragraph):
                continue
            key = hashlib.blake2b("".join(WORD.findall(paragraph)).lower().encode(), digest_size=8).digest()
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        joined = "\n\n".join(kept)
        if len(joined) >= SHORTEST:
            # A file of short entries is no one document.
            for part in _parts(kept) if re.search(r"\.dz$|/fortunes/|jargon\.txt", source) else [joined]:
                yield {"source": source, "text": part}


def _parts(kept: list[str], size: int = 4000) -> Iterator[str]:
    part: list[str] = []
    length = 0
    for paragraph in kept:
        part.append(paragraph)
        length += len(paragraph)
        if length >= size:
            yield "\n\n".join(part)
            part, length = [], 0
    if part:
        yield "\n\n".join(part)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the .jsonl files")
    parser.add_argument("--packages", default=",".join(PACKAGES), help="with commas between them")
    parser.add_argument("--debs", type=Path, help="folder that keeps the downloaded packages (default: none is kept)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    count = size = 0
    for package in options.packages.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            debs = (options.debs or Path(scratch, "debs")).resolve()
            debs.mkdir(parents=True, exist_ok=True)
            if not list(debs.glob(f"{package}_*.deb")):
                fetched = subprocess.run(
                    ["apt-get", "download", "-q", package], cwd=debs, capture_output=True, text=True
                )
                if fetched.returncode:
                    reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
                    print(f"{package}: not downloaded, left out ({reason})", file=sys.stderr)
                    continue
            unpacked = Path(scratch, "files")
            deb = max(debs.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(deb), str(unpacked)], check=True)
            for archive in unpacked.rglob("*.tar.xz"):  # of the packages NAME-source
                subprocess.run(["tar", "-xf", str(archive), "-C", str(archive.parent)], check=True)
                archive.unlink()
            found = characters = 0
            with open(options.out / f"{package}.jsonl", "w", encoding="utf-8") as stream:
                for document in documents(unpacked, seen):
                    stream.write(json.dumps(document, ensure_ascii=False) + "\n")
                    found, characters = found + 1, characters + len(document["text"])
        if not found:
            (options.out / f"{package}.jsonl").unlink()
        count, size = count + found, size + characters
        print(f"{package}: {found:,} documents, {characters / 1e6:.2f} M characters", flush=True)
    if not count:
        sys.exit("debian_text.py: no text; expected names of Debian packages that `apt-get download` finds.")
    print(f"In all {count:,} documents, {size / 1e6:.1f} M characters in {options.out}")


if __name__ == "__main__":
    main()
