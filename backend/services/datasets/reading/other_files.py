"""Names files that are no dataset that can be read here, and says what to do with them."""

import zipfile
from pathlib import Path

_EXCEL = "save it as .xlsx or .csv"
_PANDAS = 'write it as Parquet or JSON lines, e.g. with pandas: df.to_json("rows.jsonl", orient="records", lines=True)'
_PICKLE = "a pickle, which is never opened since it can run code"
# The first bytes of a file → what it is, and what to do.
_BY_BYTES = (
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel file of before 2007 (.xls), or one with a password", _EXCEL),
    (b"ARROW1", "an Arrow (Feather) file", _PANDAS),
    (b"FEA1", "a Feather file", _PANDAS),
    (b"\xff\xff\xff\xff", "an Arrow stream, as `datasets` keeps in its folders", _PANDAS),
    (b"ORC", "an ORC file", _PANDAS),
    (b"Obj\x01", "an Avro file", _PANDAS),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _PANDAS),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as CSV or JSON lines"),
    *((bytes((0x80, protocol)), _PICKLE, _PANDAS) for protocol in (2, 3, 4, 5)),
    (b"\x93NUMPY", "a NumPy array", _PANDAS),
    (b"%PDF", "a PDF", "take its text out, and save that as .txt"),
)
_ALSO_WORDS = (b"ORC", b"FEA1")  # a column may be called so
# The same for what looks like text.
_BY_WORDS = (
    (b"{\\rtf", "a document in RTF", "save its text as .txt"),
    (b"<?xml", "an XML file", "save the table as .xlsx or .csv"),
    (b"<!doctype html", "a web page", "save the table as .xlsx or .csv"),
    (b"<html", "a web page; some programs write such tables under the name .xls", "save it as .xlsx or .csv"),
    (b"<table", "a table of a web page; some programs write such tables under the name .xls", _EXCEL),
)
# A member of a zip file → what the file is, and what to do.
_BY_MEMBER = (
    ("xl/workbook.bin", "a binary Excel workbook (.xlsb)", _EXCEL),
    ("word/document.xml", "a Word document", "save its text as .txt"),
    ("ppt/presentation.xml", "a PowerPoint file", "save its text as .txt"),
    ("Index/Document.iwa", "a Numbers or Pages document", "export it as .xlsx or .csv"),
    ("Index.zip", "a Numbers or Pages document", "export it as .xlsx or .csv"),
)
_OPEN_DOCUMENTS = {
    "spreadsheet": ("an OpenDocument spreadsheet (.ods)", _EXCEL),
    "text": ("an OpenDocument text (.odt)", "save its text as .txt"),
}
_TAR_AT, _TAR = 257, b"ustar"
_WORKBOOK = "xl/workbook.xml"


def is_workbook(path: Path) -> bool:
    """Tell whether a file is an Excel workbook that can be read (.xlsx, .xlsm)."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" and _WORKBOOK in _members(path)


def zip_advice(path: Path) -> str | None:
    """Name a zip file that is a document, and say what to do; None for one that merely packs files."""
    members = _members(path)
    for member, what, advice in _BY_MEMBER:
        if member in members:
            return f"The file is {what}; {advice}."
    if "mimetype" in members and "content.xml" in members:
        with zipfile.ZipFile(path) as archive, archive.open("mimetype") as file:
            kind = file.read(200).decode("ascii", "replace").rpartition(".")[2]
        what, advice = _OPEN_DOCUMENTS.get(kind, ("an OpenDocument file", "save its text as .txt"))
        return f"The file is {what}; {advice}."
    if members and all(member.endswith(".npy") for member in members):
        return f"The file is NumPy arrays (.npz); {_PANDAS}."
    return None


def advice_for(head: bytes, *, is_text: bool) -> str | None:
    """Name what a file is by its first bytes, and say what to do; None if they do not tell.

    Args:
        is_text: Whether the file is named as plain text, in which a page's tags are what is wanted.
    """
    start = head.lstrip().lower()
    for magic, what, advice in _BY_BYTES:
        if head.startswith(magic) and (magic not in _ALSO_WORDS or b"\x00" in head):
            return f"The file is {what}; {advice}."
    for words, what, advice in _BY_WORDS:
        if start.startswith(words) and not is_text:
            return f"The file is {what}; {advice}."
    if head[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
        return "The file is a tar archive; send each file in it on its own, or in a zip."
    return None


def _members(path: Path) -> frozenset[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return frozenset()
