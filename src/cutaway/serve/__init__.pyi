from .app import create_app as create_app
from .server import serve_page as serve_page

__all__ = ["create_app", "serve_page"]
