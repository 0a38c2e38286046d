"""The style and the script of the report, which lie in the page itself."""

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#18202c;--soft:#5d6878;--line:#e2e6ec;--stall:#e07a1f;--back:#5b8def;
--bad:#cf2f3f;--good:#1f9d66;--loss:#7a4fd0;--gone:#a9b3c1;color-scheme:light}
@media (prefers-color-scheme:dark){:root:not([data-theme=light]){--bg:#0f141b;--card:#181f29;--ink:#e8ecf2;
--soft:#9aa6b6;--line:#2b3442;--stall:#f0963f;--back:#6d9cf5;--bad:#f26a77;--good:#3fc98a;--loss:#a888f0;
--gone:#55606f;color-scheme:dark}}
:root[data-theme=dark]{--bg:#0f141b;--card:#181f29;--ink:#e8ecf2;--soft:#9aa6b6;--line:#2b3442;--stall:#f0963f;
--back:#6d9cf5;--bad:#f26a77;--good:#3fc98a;--loss:#a888f0;--gone:#55606f;color-scheme:dark}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main,header{max-width:1080px;margin:0 auto;padding:0 20px}
header{display:flex;gap:16px;align-items:flex-start;justify-content:space-between;padding-top:28px}
h1{font-size:22px;margin:0;overflow-wrap:anywhere}h2{font-size:16px;margin:0 0 2px}
p{margin:2px 0 10px;color:var(--soft)}
button{font:inherit;font-size:13px;color:var(--ink);background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:5px 12px;cursor:pointer;white-space:nowrap}
button:hover{border-color:var(--soft)}
:focus-visible{outline:2px solid var(--back);outline-offset:2px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0;padding:0}
.tiles li{list-style:none;background:var(--card);border:1px solid var(--line);border-radius:12px;padding:12px 14px}
.tiles span{display:block;color:var(--soft);font-size:13px}
.tiles strong{font-size:21px;font-weight:650;font-variant-numeric:tabular-nums}
.tiles small{display:block;color:var(--soft);font-size:12px}.bad strong{color:var(--bad)}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px;margin:0 0 16px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:16px}
.pair section{margin:0}.pair{margin-bottom:16px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 6px;padding:0;color:var(--soft);font-size:13px}
.legend li{list-style:none;display:flex;align-items:center;gap:6px}
.legend i{width:12px;height:12px;border-radius:3px;display:inline-block}
.scroll{overflow-x:auto}
svg.chart{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line);stroke-width:1}
rect.stall,i.stall{fill:var(--stall);background:var(--stall)}
rect.background,i.background{fill:var(--back);background:var(--back)}
rect.failed,i.failed{fill:var(--bad);background:var(--bad)}
path.trouble{fill:var(--bad)}rect.size{fill:var(--back)}polyline.rate{fill:none;stroke:var(--good);stroke-width:2}circle.rate{fill:var(--good)}
rect.kept,i.kept{fill:var(--good);background:var(--good)}
rect.deleted,i.deleted{fill:var(--gone);background:var(--gone)}
rect.replaced,i.replaced{fill:var(--stall);background:var(--stall)}
polyline.loss{fill:none;stroke:var(--loss);stroke-width:2;stroke-linejoin:round}circle.loss{fill:var(--loss)}
i.loss{background:var(--loss);height:3px}
line.resume{stroke:var(--stall);stroke-width:1.5;stroke-dasharray:5 4}path.resume{fill:var(--stall)}
i.resume{background:var(--stall)}
line.tick{stroke:var(--good);stroke-width:2}line.tick.gone{stroke:var(--gone)}
.point:hover rect,.point:hover circle,.point.on rect,.point.on circle{stroke:var(--ink);stroke-width:2}
.point.on line{stroke-width:3}
output{display:block;min-height:21px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
details{margin-top:8px}summary{cursor:pointer;color:var(--soft);font-size:13px}
table{border-collapse:collapse;width:100%;font-size:13px;margin-top:8px}
th,td{text-align:left;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}
td{font-variant-numeric:tabular-nums}.right{text-align:right}td.path{overflow-wrap:anywhere;min-width:180px}
.no{white-space:nowrap}.status-failed,.status-unfinished,.what{color:var(--bad);font-weight:600}
.empty{color:var(--soft);margin:6px 0 0}
footer{max-width:1080px;margin:0 auto 32px;padding:0 20px;color:var(--soft);font-size:13px}
@media (max-width:640px){.pair{grid-template-columns:1fr}
svg.chart{min-width:760px}.pair svg.chart{min-width:0}header{flex-direction:column}}
@media print{button,output{display:none}section{break-inside:avoid}}
"""

SCRIPT = """
(function(){
var root=document.documentElement,button=document.getElementById('theme');
function dark(){var t=root.dataset.theme;
return t?t==='dark':matchMedia('(prefers-color-scheme: dark)').matches}
function label(){button.textContent=dark()?'Light colours':'Dark colours'}
button.hidden=false;label();
button.addEventListener('click',function(){root.dataset.theme=dark()?'light':'dark';label()});
document.querySelectorAll('svg.chart').forEach(function(chart){
var points=Array.prototype.slice.call(chart.querySelectorAll('[data-tip]')),at=-1;
var output=document.getElementById(chart.id+'-tip');
function show(next){points.forEach(function(p){p.classList.remove('on')});at=next;
if(at>=0){points[at].classList.add('on');output.textContent=points[at].dataset.tip}else{output.textContent=''}}
chart.addEventListener('keydown',function(event){var n=points.length,next;
if(!n)return;
if(event.key==='ArrowRight'||event.key==='ArrowUp')next=Math.min(n-1,at+1);
else if(event.key==='ArrowLeft'||event.key==='ArrowDown')next=Math.max(0,at-1);
else if(event.key==='Home')next=0;else if(event.key==='End')next=n-1;
else if(event.key==='Escape')next=-1;else return;
event.preventDefault();show(next)});
chart.addEventListener('mouseover',function(event){var p=event.target.closest('[data-tip]');
if(p)show(points.indexOf(p))});
chart.addEventListener('mouseleave',function(){show(-1)});
});
})();
"""
