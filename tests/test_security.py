"""What SECURITY.md promises about the code itself. What files may do to it is tested where they are read."""

import ast
from pathlib import Path

import pytest

import dit_detection

PACKAGE = Path(dit_detection.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])

RUN_CODE = {"eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {
    "os.system": "starts a shell",
    "os.popen": "starts a shell",
    "torch.save": "writes a pickle; save with safetensors",
    "yaml.load": "may build any object; take safe_load",
    "yaml.full_load": "may build any object; take safe_load",
    "yaml.unsafe_load": "builds any object; take safe_load",
    "tempfile.mktemp": "leaves time to another program to make the file",
}
FOR_ALL_PROGRAMS = {"MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES"}
# Types and constants alone; what parses comes from defusedxml.
HARMLESS_XML = {"Element", "ParseError"}


def dotted(node):
    """`a.b.c` of a name or an attribute; of anything else what is behind its last dot, with a dot."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) if isinstance(node.value, ast.Name | ast.Attribute) else ''}.{node.attr}"
    return ""


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node):
    return isinstance(node, ast.Constant) and node.value is False


def faults_of_import(node):
    module = node.module if isinstance(node, ast.ImportFrom) and node.level == 0 else None
    names = [module] if module else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    for name in names:
        if name.partition(".")[0] in PICKLES:
            yield f"imports {name}: what it reads can run code"
        if name.partition(".")[0] in ("xml", "lxml"):
            imported = {alias.name for alias in node.names} if module else {name}
            if not imported <= HARMLESS_XML:
                yield f"imports {name}: XML is parsed by defusedxml"


def faults_of_call(node):
    name, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    if name in RUN_CODE:
        yield f"calls {name}"
    if name in FORBIDDEN_CALLS:
        yield f"calls {name}: {FORBIDDEN_CALLS[name]}"
    if name == "torch.load" and not is_true(keywords.get("weights_only")):
        yield "calls torch.load without weights_only=True"
    if "allow_pickle" in keywords and not is_false(keywords["allow_pickle"]):
        yield "allows pickles"
    if "shell" in keywords and not is_false(keywords["shell"]):
        yield "starts a shell"
    trust = keywords.get("trust_remote_code", ast.Constant(False))
    if not is_false(trust) and not dotted(trust).endswith("trust_remote_code"):  # an option of the user is handed on
        yield "sets trust_remote_code: that is for the user alone"
    if name.endswith((".extractall", ".unpack_archive")):
        yield f"calls {name}: an archive can name files outside"
    if name == "Image.open" and "formats" not in keywords:
        yield "calls Image.open without formats: Pillow would start Ghostscript for EPS; take read_image"


def faults(source):
    """All that is forbidden in the text of a Python file, as "line: what"."""
    for node in ast.walk(ast.parse(source)):
        found = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = faults_of_import(node)
        elif isinstance(node, ast.Call):
            found = faults_of_call(node)
        elif isinstance(node, ast.Attribute) and node.attr in FOR_ALL_PROGRAMS and isinstance(node.ctx, ast.Store):
            found = [f"sets {node.attr}, for every program that imports this one"]
        yield from (f"line {node.lineno} {what}" for what in found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_does_what_is_forbidden(path):
    found = list(faults(path.read_text(encoding="utf-8")))
    if not path.is_relative_to(PACKAGE):  # an example opens an image of its own
        found = [fault for fault in found if "Image.open" not in fault]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "import pickle",
        "from pickle import loads",
        "import os, shelve as s",
        "import joblib.externals",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "torch.save(state, file)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "os.system(command)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=args.trust)",
        "import xml.etree.ElementTree as ET",
        "from xml.etree.ElementTree import parse",
        "from xml.dom import minidom",
        "tarfile.open(file).extractall(folder)",
        "Image.open(file)",
        "PIL.Image.MAX_IMAGE_PIXELS = None",
        "ImageFile.LOAD_TRUNCATED_IMAGES = True",
    ],
)
def test_the_forbidden_is_found(source):
    assert len(list(faults(f"x = 1\n{source}"))) == 1
    assert next(faults(f"x = 1\n{source}")).startswith("line 2 ")


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(file, weights_only=True)",
        "yaml.safe_load(text)",
        "subprocess.run(command)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=args.trust_remote_code)",
        "from xml.etree.ElementTree import Element, ParseError",
        "from defusedxml import ElementTree",
        "Image.open(file, formats=FORMATS)",
        "re.compile(pattern)",
        "torch.compile(model)",
    ],
)
def test_the_allowed_is_not(source):
    assert list(faults(source)) == []
