"""What a careless or hostile hand puts where a value or a key is meant, as raw YAML, JSON or CSV text."""

from __future__ import annotations

import json
import re

__all__ = ["CELLS", "HUGE", "JSON_KEYS", "JSON_VALUES", "METADATA", "ROWS", "SIGNS", "YAML_KEYS", "YAML_VALUES"]


def _parted(text: str) -> list[str]:
    """Return what stands between line ends or two blanks."""
    return [part for part in re.split(r"\n| {2,}", text) if part]


SIGNS = [*"\t\r\0\x7f\x85\u2028\u202e\ufeff\ufffeé😀{}[]&*!|>'\"%@`,?-#:~<\\", "\r\n", "\n\n", "\x1b[31m"]

LONG = 9_999

# YAML

_LAUGHS = ", ".join(f"&l{level} [{', '.join([f'*l{level - 1}'] * 9)}]" for level in range(1, 9))
_MANY = ", ".join(f"k{number}: {{source: b}}" for number in range(999))
YAML_VALUES = [
    "",
    *_parted(r"""
    ~  null  no  yes  true  .nan  .inf  -.inf  3e-4  1e999  -1  0  1.5  010  0o17  0x1F  1_000  1__0  _1  +5  -0
    2024-01-01  12:30:30  ${HOME}  auto  end  off  lora  full  sft  causal-lm  train  validation  main  a/b  /a
    a//b  ../..  text:  <<  =  |  >  ?  -  :  @  `  %  ,  ]  }  'a  "a  ''  ""  "\0"  "\ud800"  "\U00110000"
    "\x1b[31m"  "\u202e"  é  😀  #a  []  {}  [[]]  [{}]  [1, 2, 3]  [a, {a: [b, {c: d}]}]  {a: b, a: c}  a b # c
    - a  ? a  a: b  [a, a: b]  *a  &a  &a &b  &a x  &a [*a]  &a {b: *a}  *missing  {<<: {a: 1}}  {<<: *a}
    <<: {a: b}  !a  !!str  !!int  !!x%  !<!> a  !<tag:yaml.org,2002:int> 5  %YAML 9.9  %TAG ! x  ---  --- a  ...
    !secret x  !!map a  !!int []  !!float {a: b}  !!str {}  !!str [a]  !!null [1]  !!bool 3  !!bool {}  !!int x
    !!seq {}  !!binary aGVsbG8=  !!set {a, b}  !!omap [a: 1]  !!timestamp 2024-01-01  !!python/object:os.system {}
    !!python/name:os.system  !!python/object/apply:os.system [ls]  {? [a] : b}  {? {a: b} : c}  {1: a, 1: b}  {~: a}
    {true: a, .nan: b}  {a.b: 1}  {'[0]': 1}  {"\ud800": 1}  {"a\nb": 1}  {"\0": 1}  {"": 1}
    {type: lora, type: full}  {type: [lora]}  {type: {a: b}}  {type: 1}  {name: {}}  {sources: {a: {}}}
    {sources: []}  {steps: .5, epochs: 1}  [validation, {source: a}]  {against: [validation, x]}
    {near: {}, exact: on}
    """),
    *["|\n  text\n  more", ">-\n  text\n\n  more", "|9\n text", "a\n  b", '"a\n\n  b"', "'a\n b'"],
    *["9" * 79, "9" * 81, "9" * 5_000, "-" + "9" * 400, "0x" + "f" * 5_000, "1." + "9" * LONG, "1e" + "9" * 999],
    *[
        "x" * 1_100,
        "x" * 99_999,
        f"'{'é' * LONG}'",
        f"{{{'k' * 999}: 1}}",
        f"{{? {'k' * LONG} : 1}}",
        f"o/{'w' * LONG}/a",
    ],
    *[f"*{'m' * LONG}", f"!{'t' * LONG}", f"!!float {'x' * LONG}", "passw" * LONG, "hf_" * LONG, "://" * LONG],
    *[f"'token{' ' * LONG}'", "hf_" + "aB1" * 12, "sk-" + "a1" * 20],
    *["[" * 39 + "]" * 39, "[" * 5_000, "[" * 300 + "]" * 300, "{a: " * 60 + "b" + "}" * 60, "? " * 99, "- " * 99],
    *[f"[&l0 [ha], {_LAUGHS}]", f"[{'a, ' * LONG}]", f"[{'a, ' * 25_000}]", f"{{{'a: 1, ' * 3_000}}}"],
    *[f"{{{_MANY}}}", f"{{sources: {{a: {{source: b, weight: 1}}, {_MANY}}}}}"],
]
YAML_KEYS = [
    *_parted(r"""
    <<  ~  1  1.5  true  .nan  a.b  a[0]  [key]  é  😀  ""  ''  ? a  ? [a]  ? {a: b}  *a  &a k  !!str k  !!int k
    !t k  - k  k:  :k  "\ud800"  "\0"  "a\nb"  "\x1b[31mk"  api_token  password  type  sources  source  architecture
    name  lr
    """),
    *["k" * 1_000, "k" * 2_000, f"'{'é' * 500}'", "hf_" + "aB1" * 12, "passw" * 200],
]

# JSON

_DEPTHS = [2, 10, 20, 31, 32, 33, 60, 120, 199, 201, 300, 480, 700, 950, 1_500, 10_000, 100_000]
_NESTED = [
    *_parted(r'{  7  "\ud800"  {"a": "\ud800"}  NaN  {"a": NaN}  [1]  null'),
    *["[" * 20 + "]" * 20, "[" * 900 + "]" * 900, "[" * 20_000, "9" * 5_000, '{"":' * 500 + "1" + "}" * 500],
]
"""What may stand in text that is itself read as JSON: a tool call's arguments, say."""
_TURN = {"role": "user", "content": "a cat?"}
_CHANGED = [
    {"role": "robot"},
    {"role": ["user"]},
    {"content": ["a"]},
    {"content": None},
    {"weight": 7},
    {"weight": [0]},
]


def _called(arguments: str) -> str:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return json.dumps([_TURN, {"role": "assistant", "content": "b", "tool_calls": [call]}])


JSON_VALUES = [
    "",
    *_parted(r"""
    null  true  false  0  -1  -0  1.5  1e400  NaN  Infinity  -Infinity  .5  +1  01  0x10  tru  nul  ""  "x"  "a  'x'
    "\  "\x"  []  {}  [[]]  [{}]  [null]  [,]  [1,]  {,}  1 2  "a": "b"  }, {"a": 1  /*a*/ 1  9223372036854775807
    9223372036854775808  18446744073709551616  -9223372036854775809  "\u0000"  "\ud800"  "\udc00x"  "\ud83d\ude00"
    "\u202e"  " "  "\n"  "null"  "2018-01-01"  "2018-01-01T00:00:00Z"  [null, "a"]  [1, "a"]  ["a", 1.5, true]
    [{"a": 1}, {"b": "x"}]  [[1], [[2]]]  {"a": 1}  {"a": {}}  {"a": 1, "a": 2}  {"": 1}  {"a": {"a": {"a": null}}}
    {"name": 7}  {"f": []}  [7]  [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    [{"name": "f"}]  [{"from": "gpt"}]
    """),
    *['"a\tb"', '"\ufeff"', '"\ufffd"', "9" * 40, "9" * 5_000, "1" * 400 + ".5", "[" * LONG, '{"a":' * LONG],
    *["[" * depth + "]" * depth for depth in _DEPTHS],
    *['{"a":' * depth + "1" + "}" * depth for depth in _DEPTHS],
    *['[{"a":' * (depth // 2) + "1" + "}]" * (depth // 2) for depth in _DEPTHS],
    *[f'"{"x" * 999}"', f'"{"wide words " * LONG}"', f'"{"é" * 99_999}"', f"[{'1,' * LONG}1]"],
    *["{" + ", ".join(f'"k{number}": {number}' for number in range(2_000)) + "}", '"' + "\\ud83d\\ude00" * 999 + '"'],
    *[json.dumps(turns) for turns in ([_TURN], [_TURN, _TURN], ["a"], *([_TURN | change] for change in _CHANGED))],
    *[_called(words) for words in _NESTED],
    *[json.dumps([{"from": "function_call", "value": words}]) for words in _NESTED],
    *[json.dumps(words) for words in _NESTED],
]
HUGE = ["[" + '"a",' * 10**5 + '"a"]', f'"{"many words " * 10**5}"', '"' + "\\u00e9" * 10**5 + '"', f'"{"x" * 10**7}"']
"""Values of a megabyte or ten."""
JSON_KEYS = [
    *_parted(r"""
    ""  " "  "a.b"  "é"  "😀"  "\u0000"  "\ud800"  "a\nb"  "text "  "Text"  a  1  null  "  "text"  "label"  "prompt"
    "completion"  "messages"  "conversations"  "input_ids"  "labels"  "trained"  "tools"  "system"  "input"
    "instruction"  "output"  "length"  "source"  "index"  "__index_level_0__"  "weight"
    """),
    f'"{"k" * 2_000}"',
]
ROWS = [
    *["", " ", "\ufeff{}", "[" * LONG, '{"":' * LONG],
    *_parted('{}  []  7  null  "x"  [{}]  {  }  {}{}  #  {"text": "a"}  {"a": {}}'),
]

# CSV, and the metadata of Parquet and Arrow files

CELLS = [
    *_parted("""0  007  -1  1.5  1e5  nan  null  x  é  😀  "a, b"  "a ""b\"""  "a  a"b  "a"b"""),
    *["", " ", "\t", "\0", "\r", "a\rb", '"a\nb"', "\ufeff", "\u2028", "9" * 30, "x" * 200_000, "," * 50],
]
_FEATURES: list[object] = [
    [],
    {"text": 7},
    {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": ["bad", "good"], "_type": "ClassLabel"}},
    {"text": {"dtype": "no such type", "_type": "Value"}},
    {"text": {"_type": "os.system"}},
    {"label": {"names": 7, "_type": "ClassLabel"}},
    {"label": {"names": ["a", "a"], "_type": "ClassLabel"}},
    {"text": {"_type": "Image"}, "system": {"_type": "Image"}, "other": {"_type": "Audio"}},
    {"messages": {"feature": {"role": {"dtype": "string", "_type": "Value"}}, "_type": "List"}},
]
METADATA = [
    *_parted('{  7  []  null  "x"  {"info": 7}  \xff'),
    *["", "[" * LONG, *(json.dumps({"info": {"features": features}}) for features in _FEATURES)],
]
"""What a schema may say under the key `huggingface`, where `datasets` looks for its features."""
