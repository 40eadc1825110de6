/* Before the first paint: the theme and the language that were chosen here, so that nothing flashes. */
"use strict";
{
  const chosen = (name, allowed) => {
    try {
      const value = localStorage.getItem(`chatloom/${name}`);
      return allowed.includes(value) ? value : null;
    } catch {
      return null; // storage is forbidden here: the page works without
    }
  };
  document.documentElement.dataset.theme = chosen("theme", ["light", "dark"]) ?? "auto";
  document.documentElement.lang =
    chosen("language", ["en", "zh"]) ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
}
