"""The stand-in of the vendor's ``QAicApi_pb2``: the messages of the contract page (e.1), by field number."""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_KINDS = {"string": 9, "uint32": 13, "float": 2, "bool": 8, "message": 11}
#: message -> (field, number, type, repeated); a type with a capital letter is one of these messages.
_MESSAGES = {
    "TensorShape": [("type", 1, "uint32", False), ("dims", 2, "uint32", True)],
    "IoShapes": [("shapes", 1, "TensorShape", True)],
    "IoBinding": [
        ("name", 1, "string", False), ("index", 2, "uint32", False), ("type", 3, "uint32", False),
        ("dir", 4, "uint32", False), ("quant_scale", 5, "float", False), ("quant_offset", 6, "uint32", False),
        ("dims", 7, "uint32", True), ("size", 8, "uint32", False), ("is_partial_buf_allowed", 10, "bool", False),
        ("is_valid", 20, "bool", False),
    ],
    "IoSet": [("name", 1, "string", False), ("bindings", 2, "IoBinding", True)],
    "IoDesc": [
        ("io_sets", 1, "IoSet", True), ("selected_set", 2, "IoSet", False), ("program_name", 3, "string", False),
        ("allowed_shapes", 8, "IoShapes", True),
    ],
}  # fmt: skip


def _classes() -> dict[str, type]:
    file = descriptor_pb2.FileDescriptorProto(name="stand_in_aicapi.proto", package="aicapi", syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            added = message.field.add(name=field, number=number, label=3 if repeated else 1)
            added.type = _KINDS.get(kind, _KINDS["message"])
            if kind in _MESSAGES:
                added.type_name = f".aicapi.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"aicapi.{n}")) for n in _MESSAGES}


_MADE = _classes()
IoDesc, IoSet, IoBinding, IoShapes, TensorShape = (
    _MADE[name] for name in ("IoDesc", "IoSet", "IoBinding", "IoShapes", "TensorShape")
)
