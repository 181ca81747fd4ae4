"""Models of raw audio, and the tools around them: audio files, codes, data, training, the `audiokernels` command.

    from audiomodels import Recordings, WaveNet, clips

Importing this package imports nothing else: a name below is loaded from its file when it is first used, so that
a missing optional package is only met by who needs it.
"""

_HOME = {
    "AudioTransformer": "audio_transformer",
    "AudioTransformerConfig": "audio_transformer",
    "CNN": "cnn",
    "CNNConfig": "cnn",
    "TagClips": "tag_data",
    "TagCrops": "tag_data",
    "Mixtures": "tag_data",
    "Tagging": "tagging",
    "WaveNet": "wavenet",
    "WaveNetConfig": "wavenet",
    "AudioError": "audio",
    "AudioNotice": "audio",
    "audio_info": "audio",
    "read_audio": "audio",
    "write_audio": "audio",
    "Crops": "data",
    "Recording": "data",
    "Recordings": "data",
    "clips": "data",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
