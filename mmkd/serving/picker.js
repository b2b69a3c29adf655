// Reads the chosen, dropped or pasted file in the browser and sends it inside an event of the page.
const most = props.limit * 1024 * 1024;
const drop = () => element.querySelector(".mmkd-drop");

function read(file) {
  const alert = element.querySelector("[role=alert]");
  if (!file) return;
  if (file.size > most) {
    alert.textContent = `This file has ${(file.size / 1048576).toFixed(1)} MB; at most ${props.limit} MB are allowed.`;
    return;
  }
  alert.textContent = "";
  const reader = new FileReader();
  reader.onload = () => {
    props.value = "data:application/octet-stream;base64," + reader.result.split(",")[1];
    trigger("upload");
  };
  reader.readAsDataURL(file);
}

element.addEventListener("change", (event) => {
  if (event.target.type !== "file") return;
  event.stopPropagation();
  read(event.target.files[0]);
});
element.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop().classList.add("over");
});
element.addEventListener("dragleave", () => drop().classList.remove("over"));
element.addEventListener("drop", (event) => {
  event.preventDefault();
  drop().classList.remove("over");
  read(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = event.clipboardData && event.clipboardData.files[0];
  if (file) read(file);
});
