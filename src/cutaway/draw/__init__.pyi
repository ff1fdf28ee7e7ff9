from .attention import Pattern as Pattern
from .attention import attention_html as attention_html
from .attention import attention_svg as attention_svg
from .blocks import Card as Card
from .blocks import EffectBlock as EffectBlock
from .blocks import Fact as Fact
from .blocks import Figure as Figure
from .blocks import Figures as Figures
from .blocks import Section as Section
from .blocks import SelfTest as SelfTest
from .blocks import TourResult as TourResult
from .charts import Bar as Bar
from .charts import Series as Series
from .charts import bars_html as bars_html
from .charts import effect_html as effect_html
from .charts import line_legend as line_legend
from .charts import line_svg as line_svg
from .circuit import CircuitEdge as CircuitEdge
from .circuit import circuit_svg as circuit_svg
from .fragments import draw_block as draw_block
from .heatmap import heatmap_scale as heatmap_scale
from .heatmap import heatmap_svg as heatmap_svg
from .page import page_html as page_html
from .page import write_page as write_page
from .panels import table_html as table_html
from .result import Result as Result
from .scale import Scale as Scale
from .style import standalone as standalone
from .style import stylesheet as stylesheet
from .tokens import lens_html as lens_html
from .tokens import tokens_html as tokens_html
from .tokens import tokens_scale as tokens_scale

__all__ = [
    "Bar",
    "Card",
    "CircuitEdge",
    "EffectBlock",
    "Fact",
    "Figure",
    "Figures",
    "Pattern",
    "Result",
    "Scale",
    "Section",
    "SelfTest",
    "Series",
    "TourResult",
    "attention_html",
    "attention_svg",
    "bars_html",
    "circuit_svg",
    "draw_block",
    "effect_html",
    "heatmap_scale",
    "heatmap_svg",
    "lens_html",
    "line_legend",
    "line_svg",
    "page_html",
    "standalone",
    "stylesheet",
    "table_html",
    "tokens_html",
    "tokens_scale",
    "write_page",
]
